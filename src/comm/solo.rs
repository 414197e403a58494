//! A world of one: every collective is a copy.

use anyhow::Result;

use super::slice::{all_gather_call, all_reduce_call, broadcast_call, reduce_scatter_call};
use super::{Communicator, Slice, SliceMut};

/// The only rank of its world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, data: SliceMut) -> Result<()> {
        all_reduce_call(&data).map(drop)
    }

    fn reduce_scatter(&self, input: Slice, output: SliceMut) -> Result<()> {
        reduce_scatter_call(&input, &output, 1)?;
        output.bytes().copy_from_slice(input.bytes());
        Ok(())
    }

    fn all_gather(&self, input: Slice, output: SliceMut) -> Result<()> {
        all_gather_call(&input, &output, 1)?;
        output.bytes().copy_from_slice(input.bytes());
        Ok(())
    }

    fn broadcast(&self, data: SliceMut, root: usize) -> Result<()> {
        broadcast_call(&data, root, 1).map(drop)
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_of_one_copies() -> Result<()> {
        let (input, mut output) = ([1.5f32, -2.0], [0.0f32; 2]);
        Solo.reduce_scatter(Slice::F32(&input), SliceMut::F32(&mut output))?;
        assert_eq!(input, output);
        let (input, mut output) = ([3u8, 4], [0u8; 2]);
        Solo.all_gather(Slice::U8(&input), SliceMut::U8(&mut output))?;
        assert_eq!(input, output);
        Solo.all_reduce(SliceMut::F64(&mut [1.0]))?;
        Solo.barrier()
    }

    #[test]
    fn wrong_arguments_are_errors() {
        assert!(Solo.all_gather(Slice::U8(&[1]), SliceMut::U8(&mut [0, 0])).is_err());
        assert!(Solo.all_gather(Slice::U8(&[1]), SliceMut::F32(&mut [0.0])).is_err());
        assert!(Solo.all_reduce(SliceMut::U8(&mut [1])).is_err());
        assert!(Solo.broadcast(SliceMut::U8(&mut [1]), 1).is_err());
    }
}
