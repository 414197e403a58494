//! Ranks as threads: every collective against a naive sum in rank order, to the bit, and what ranks are told when
//! somebody is late, absent, gone or somewhere else.

use std::fmt::Debug;

use half::{bf16, f16};
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::*;
use crate::comm::CommunicatorExt;
use crate::comm::probe::{Delayed, Recorded};
use crate::comm::{Call, Kind, Scalar};

const PATIENT: Duration = Duration::from_secs(120);

/// Runs `body` as every rank of a world of threads; the results by rank.
fn world<T: Send>(size: usize, timeout: Duration, body: impl Fn(Shared) -> T + Sync) -> Vec<T> {
    let ranks = Shared::threads(size, timeout).unwrap();
    std::thread::scope(|scope| {
        let body = &body;
        let ranks: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || body(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

trait Number: Plain + Debug {
    fn draw(word: u64) -> Self;
    fn wide(self) -> f64;
    fn sum(values: impl Iterator<Item = Self>) -> Self;
    fn slice(data: &[Self]) -> Slice<'_>;
    fn slice_mut(data: &mut [Self]) -> SliceMut<'_>;
}
use crate::comm::slice::Plain;

macro_rules! number {
    ($type:ty, $variant:ident, $wide:ty, $from:expr, $to:expr) => {
        impl Number for $type {
            fn draw(word: u64) -> Self {
                // Magnitudes from 2^-6 to 2^9, so that the order of summation shows.
                let size = 2f64.powi((word % 16) as i32 - 6);
                $from(((word >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as $wide * size as $wide)
            }
            fn wide(self) -> f64 {
                ($to)(self) as f64
            }
            fn sum(values: impl Iterator<Item = Self>) -> Self {
                let mut sum: Option<$wide> = None;
                for value in values {
                    let value: $wide = ($to)(value);
                    sum = Some(sum.map_or(value, |sum| sum + value));
                }
                $from(sum.unwrap())
            }
            fn slice(data: &[Self]) -> Slice<'_> {
                Slice::$variant(data)
            }
            fn slice_mut(data: &mut [Self]) -> SliceMut<'_> {
                SliceMut::$variant(data)
            }
        }
    };
}
number!(f32, F32, f32, |x: f32| x, |x: f32| x);
number!(f64, F64, f64, |x: f64| x, |x: f64| x);
number!(bf16, BF16, f32, bf16::from_f32, bf16::to_f32);
number!(f16, F16, f32, f16::from_f32, f16::to_f32);

fn draws<T: Number>(seed: u64, length: usize) -> Vec<T> {
    let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| T::draw(generator.next_u64())).collect()
}

fn assert_same<T: Number>(got: &[T], wanted: &[T], what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let differ = got.iter().zip(wanted).position(|(got, wanted)| got.wide().to_bits() != wanted.wide().to_bits());
    assert_eq!(differ, None, "{what}");
}

/// All collectives of one number type on `length` elements, on this rank.
fn check<T: Number>(rank: &impl Communicator, length: usize) {
    let (me, size) = (rank.rank(), rank.world_size());
    let what = format!("{} x {length}, rank {me} of {size}", std::any::type_name::<T>());
    let inputs: Vec<Vec<T>> = (0..size).map(|r| draws(r as u64 + 1, length * size)).collect();
    let sums: Vec<T> = (0..length * size).map(|i| T::sum(inputs.iter().map(|input| input[i]))).collect();

    let mut all = inputs[me].clone();
    rank.all_reduce(T::slice_mut(&mut all)).unwrap();
    assert_same(&all, &sums, &format!("all_reduce {what}"));

    let mut part: Vec<T> = draws(99, length);
    rank.reduce_scatter(T::slice(&inputs[me]), T::slice_mut(&mut part)).unwrap();
    assert_same(&part, &sums[me * length..][..length], &format!("reduce_scatter {what}"));

    let mut gathered: Vec<T> = draws(98, length * size);
    rank.all_gather(T::slice(&part), T::slice_mut(&mut gathered)).unwrap();
    assert_same(&gathered, &all, &format!("reduce_scatter and all_gather against all_reduce, {what}"));

    for root in 0..size {
        let mut data = inputs[me][..length].to_vec();
        rank.broadcast(T::slice_mut(&mut data), root).unwrap();
        assert_same(&data, &inputs[root][..length], &format!("broadcast from {root}, {what}"));
    }
    rank.barrier().unwrap();
}

fn check_all_types(rank: &impl Communicator, length: usize) {
    check::<f32>(rank, length);
    check::<f64>(rank, length);
    check::<bf16>(rank, length);
    check::<f16>(rank, length);
    let bytes: Vec<u8> = (0..length).map(|i| (i * 7 + rank.rank()) as u8).collect();
    let mut all = vec![0; length * rank.world_size()];
    rank.all_gather(Slice::U8(&bytes), SliceMut::U8(&mut all)).unwrap();
    assert!(all.iter().enumerate().all(|(i, &byte)| byte == (i % length * 7 + i / length) as u8));
}

#[test]
fn every_collective_equals_the_naive_sum_in_rank_order() {
    for size in 1..=4 {
        let larger_than_the_window = Window::create(size).unwrap().buffer() / 4 * 2 + 13;
        world(size, PATIENT, |rank| {
            for length in [0, 1, 7, 64, 5000, larger_than_the_window] {
                check_all_types(&rank, length);
            }
        });
    }
}

#[test]
fn more_ranks_than_cores_and_late_ranks_change_nothing() {
    world(9, PATIENT, |rank| check_all_types(&Delayed::new(rank, 5, Duration::from_millis(3)), 333));
}

#[test]
fn small_values_are_shared() {
    world(3, PATIENT, |rank| {
        let me = rank.rank();
        assert_eq!(rank.all_reduce_f64(me as f64 + 0.5).unwrap(), 4.5);
        assert!(rank.any(me == 2).unwrap() && !rank.all(me == 2).unwrap());
        assert!(!rank.any(false).unwrap() && rank.all(true).unwrap());
        assert_eq!(rank.broadcast_string(format!("from {me}"), 1).unwrap(), "from 1");
        let texts = rank.gather_strings(&"x".repeat(me)).unwrap();
        assert_eq!(texts, ["", "x", "xx"]);
        assert_eq!(rank.agree(Ok(me)).unwrap(), me);
        let refused = rank.agree(if me == 1 { Err(crate::Refusal::error("no such folder")) } else { Ok(()) });
        let refused = refused.unwrap_err();
        assert_eq!(refused.downcast::<crate::Refusal>().unwrap().problems, ["no such folder"]);
        let failed = rank.agree(if me == 0 { Err(anyhow::anyhow!("disk full")) } else { Ok(()) }).unwrap_err();
        assert_eq!(failed.to_string(), if me == 0 { "disk full" } else { "rank 0 failed: disk full" });
    });
}

#[test]
fn calls_are_recorded_in_order() {
    world(2, PATIENT, |rank| {
        let rank = Recorded::new(rank);
        rank.barrier().unwrap();
        rank.all_reduce(SliceMut::BF16(&mut [bf16::ONE; 3])).unwrap();
        rank.broadcast(SliceMut::U8(&mut [1; 2]), 1).unwrap();
        let wanted = [
            Call::barrier(),
            Call::new(Kind::AllReduce, Scalar::BF16, 3),
            Call { root: 1, ..Call::new(Kind::Broadcast, Scalar::U8, 2) },
        ];
        assert_eq!((rank.take(), rank.take()), (wanted.to_vec(), vec![]));
    });
}

#[test]
fn who_does_not_join_is_named_with_where_everyone_is() {
    let present = std::sync::Barrier::new(3);
    let messages = world(3, Duration::from_millis(1000), |rank| {
        rank.barrier().unwrap();
        let result = match rank.rank() {
            // Computes on and on; the others give up.
            2 => Ok(()),
            _ => rank.all_gather(Slice::F32(&[1.0, 2.0]), SliceMut::F32(&mut [0.0; 6])),
        };
        present.wait();
        (result, rank.barrier())
    });
    for (result, _) in &messages[..2] {
        let message = result.as_ref().unwrap_err().to_string();
        assert!(message.contains("rank 2 has not joined all_gather #2 (f32, 2 elements) within 1 s"), "{message}");
        assert!(message.contains("ranks 0, 1 wait in it"), "{message}");
        assert!(message.contains("rank 2 was last seen in barrier #1"), "{message}");
    }
    let late = messages[2].1.as_ref().unwrap_err();
    assert!(late.is::<PeerFailure>() && late.to_string().contains("rank 2 has not joined"), "{late}");
}

#[test]
fn different_calls_are_an_error_on_every_rank() {
    let messages = world(4, PATIENT, |rank| {
        rank.barrier().unwrap();
        let error = match rank.rank() {
            0 | 1 => rank.all_gather(Slice::F32(&[1.0]), SliceMut::F32(&mut [0.0; 4])),
            2 => rank.reduce_scatter(Slice::F32(&[0.0; 4]), SliceMut::F32(&mut [1.0])),
            _ => rank.broadcast(SliceMut::F16(&mut [f16::ONE; 9]), 3),
        };
        assert!(rank.barrier().unwrap_err().to_string().contains("no collective can follow"));
        error.unwrap_err().to_string()
    });
    for message in messages {
        assert_eq!(
            message,
            "the ranks called different collectives: ranks 0, 1 called all_gather #2 (f32, 1 element), \
             rank 2 called reduce_scatter #2 (f32, 1 element), rank 3 called broadcast #2 (f16, 9 elements, from rank 3)"
        );
    }
}

#[test]
fn different_lengths_types_and_roots_are_different_calls() {
    for (case, fragment) in [(0, "5 elements"), (1, "f64"), (2, "from rank 1")] {
        let errors = world(2, PATIENT, |rank| match (case, rank.rank()) {
            (0, 1) => rank.all_reduce(SliceMut::F32(&mut [0.0; 5])),
            (1, 1) => rank.all_reduce(SliceMut::F64(&mut [0.0; 4])),
            (2, r) => rank.broadcast(SliceMut::F32(&mut [0.0; 4]), r),
            _ => rank.all_reduce(SliceMut::F32(&mut [0.0; 4])),
        });
        for error in errors {
            let message = error.unwrap_err().to_string();
            assert!(message.contains("different collectives") && message.contains(fragment), "{message}");
        }
    }
}

#[test]
fn a_rank_that_fails_ends_the_others_waits() {
    let errors = world(3, PATIENT, |rank| match rank.rank() {
        1 => {
            rank.abort("no memory for segment mid_block");
            rank.barrier().unwrap_err().to_string()
        }
        _ => {
            let error = rank.barrier().unwrap_err();
            assert!(error.is::<PeerFailure>() && rank.barrier().unwrap_err().is::<PeerFailure>());
            error.to_string()
        }
    });
    assert_eq!(errors[0], "rank 1 failed: no memory for segment mid_block");
    assert_eq!(errors[2], errors[0]);
    assert_eq!(errors[1], "this rank has given up: no memory for segment mid_block");
}

#[test]
fn nobody_waits_for_a_rank_that_left() {
    let errors = world(2, PATIENT, |rank| match rank.rank() {
        0 => None,
        _ => Some(rank.barrier().unwrap_err()),
    });
    let error = errors[1].as_ref().unwrap();
    assert!(error.is::<PeerFailure>(), "{error}");
    assert!(error.to_string().contains("rank 0 failed: it ended before barrier #1"), "{error}");
}

#[test]
fn wrong_arguments_of_one_rank_end_the_others_waits() {
    let errors = world(2, PATIENT, |rank| match rank.rank() {
        0 => rank.all_gather(Slice::F32(&[1.0]), SliceMut::F32(&mut [0.0; 3])).unwrap_err().to_string(),
        _ => rank.all_gather(Slice::F32(&[1.0]), SliceMut::F32(&mut [0.0; 2])).unwrap_err().to_string(),
    });
    assert!(errors[0].contains("into 3") && errors[1].contains(&errors[0]), "{errors:?}");
}

#[test]
fn a_rank_learns_of_a_failure_without_a_collective() {
    let ranks = Shared::threads(2, PATIENT).unwrap();
    assert_eq!(ranks[0].failed_peer(), None);
    ranks[1].abort("the disk is full");
    let failure = PeerFailure { rank: 1, message: "the disk is full".into() };
    assert_eq!(ranks[0].failed_peer(), Some(failure));
    assert_eq!(ranks[1].failed_peer(), None);
}
