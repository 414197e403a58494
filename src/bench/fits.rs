//! What no machine of this size can measure, refused before there is an attempt at the memory for it.

use anyhow::Result;

use super::shape;
use crate::Refusal;
use crate::plan::{memory_bytes, size};

/// Rows of `latent` x `latent` latents whose first tensor alone would not fit the machine's memory are refused.
pub fn check_rows(batch: usize, latent: usize) -> Result<()> {
    let (config, _) = shape::sd15();
    let needed =
        [latent, latent, config.levels[0].channels, size_of::<f32>()].into_iter().fold(batch, usize::saturating_mul);
    check(needed, &format!("--batch {batch} and --latent {latent}"), "lower one of them")
}

/// AdamW's states of so many elements.
pub(super) fn check_elements(elements: usize) -> Result<()> {
    // Weights, gradients and two moments.
    check(elements.saturating_mul(4 * size_of::<f32>()), &format!("--elements {elements}"), "lower it")
}

fn check(needed: usize, options: &str, remedy: &str) -> Result<()> {
    let there = memory_bytes();
    if needed as u64 <= there {
        return Ok(());
    }
    let (needed, there) = (size(needed), size(there as usize));
    Err(Refusal::error(format!("{options}: this takes {needed} and more, and this machine has {there}: {remedy}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_machine_holds_is_refused() {
        assert!(check_rows(1, 64).is_ok() && check_elements(1000).is_ok());
        let told = |result: Result<()>| result.unwrap_err().downcast::<Refusal>().unwrap().problems.remove(0);
        assert!(told(check_rows(1_000_000_000_000, 2048)).contains("--batch 1000000000000 and --latent 2048"));
        assert!(told(check_elements(1_000_000_000_000)).contains("lower it"));
    }
}
