//! Memory of the host for what comes from an accelerator and is used up at once: page-locked, since copies into other memory
//! are several times slower, and kept, since locking takes longer than a copy. One for each thread that needs it.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use anyhow::Result;
use candle_core::DType;

use crate::device::{Accelerator, Buffer};

thread_local!(static KEPT: RefCell<Option<(Weak<dyn Accelerator>, Buffer)>> = const { RefCell::new(None) });

/// Runs `work` with `len` numbers of any value, into which `from` copies fast.
pub(super) fn with<R>(
    from: &Arc<dyn Accelerator>,
    len: usize,
    work: impl FnOnce(&mut [f32]) -> Result<R>,
) -> Result<R> {
    let own = Arc::downgrade(from);
    // Taken out, so that `work` may come here again.
    let kept = KEPT.take().filter(|(whose, buffer)| Weak::ptr_eq(whose, &own) && buffer.len() >= len);
    let mut buffer = match kept {
        Some((_, buffer)) => buffer,
        None => Buffer::staging(DType::F32, len, from)?,
    };
    let result = work(&mut buffer.as_mut_slice()[..len]);
    KEPT.set(Some((own, buffer)));
    result
}
