//! A state file as its users see it, in all four ways of moving bytes, and what happens when something is wrong.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use candle_core::DType;

use super::*;
use crate::Refusal;
use crate::device::Arena;

const MIB: usize = STATE_BLOCK;

fn options(dir: &Path, bytes: usize) -> StateFileOptions {
    StateFileOptions::new(dir, 0, bytes as u64)
}

/// With and without a ring, past the cache and through it.
fn all_ways(dir: &Path, bytes: usize) -> impl Iterator<Item = StateFileOptions> {
    let ways = [(None, None), (None, Some(false)), (Some(false), None), (Some(false), Some(false))];
    ways.map(|(ring, direct)| StateFileOptions { ring, direct, ..options(dir, bytes) }).into_iter()
}

fn filled(bytes: usize, seed: u64) -> Buffer {
    let mut buffer = Buffer::unbudgeted(DType::U8, bytes).unwrap();
    for (i, word) in buffer.bytes_mut().chunks_mut(8).enumerate() {
        let draw = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed).rotate_left(29);
        word.copy_from_slice(&draw.to_le_bytes()[..word.len()]);
    }
    buffer
}

fn error(pending: Pending<Buffer>) -> String {
    format!("{:#}", pending.wait().unwrap_err())
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// To change the file as a drive that fails would.
fn behind_its_back(file: &StateFile) -> File {
    open(file.path())
}

#[test]
fn what_was_written_comes_back_whatever_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [1, 63, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 2 * MIB + 4096, 5 * MIB + 12345];
    for options in all_ways(dir.path(), 32 * MIB) {
        let file = StateFile::create(options.clone()).unwrap();
        let tuning = file.tuning();
        assert!((options.ring.is_none() || !tuning.ring) && (options.direct.is_none() || !tuning.direct));
        let regions: Vec<Region> =
            sizes.iter().map(|&size| file.allocate(size, &format!("segment {size}")).unwrap()).collect();
        let writes: Vec<_> =
            regions.iter().map(|r| r.write(0, r.bytes(), filled(r.bytes(), r.bytes() as u64))).collect();
        writes.into_iter().for_each(|write| drop(write.wait().unwrap()));
        for region in &regions {
            let size = region.bytes();
            let expected = filled(size, size as u64);
            // Into memory with more behind it, which must stay as it is.
            let mut into = Buffer::unbudgeted(DType::U8, size + 100).unwrap();
            into.bytes_mut().fill(0xAB);
            let back = region.read(0, size, into).wait().unwrap();
            assert_eq!(&back.bytes()[..size], expected.bytes());
            assert!(back.bytes()[size..].iter().all(|&b| b == 0xAB));
        }
        // From within, up to within a block.
        let region = &regions[9];
        let expected = filled(region.bytes(), region.bytes() as u64);
        for bytes in [1, 5000, 8192, MIB, 2 * MIB + 7, 3 * MIB, 4 * MIB + 12345] {
            let back = region.read(MIB, bytes, filled(bytes, 9)).wait().unwrap();
            assert_eq!(back.bytes(), &expected.bytes()[MIB..MIB + bytes]);
        }
        assert!(file.traffic().written_bytes >= sizes.iter().sum::<usize>() as u64);
        assert!(file.traffic().read_bytes > file.traffic().written_bytes);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the files go with their owner");
}

#[test]
fn pieces_of_every_size_make_the_same_request() {
    let dir = tempfile::tempdir().unwrap();
    let reserved = reserve::reserve(dir.path(), 0, 8 << 20, None).unwrap();
    let bytes = 3 * MIB + 5000;
    for (block, ring) in [4096, 64 << 10, MIB, 4 * MIB].into_iter().flat_map(|b| [(b, false), (b, true)]) {
        let tuning = Tuning { depth: 3, block, direct: reserved.direct, ring };
        let common = Common { piece_bytes: block, meter: Arc::default(), delays: None };
        // Not everywhere is a process allowed to have a ring.
        let Ok(engine) = Engine::start(&reserved.file, &tuning, common) else { continue };
        let area = Arc::new(Area::new(reserved.path.clone(), "test", HEADER_BYTES, bytes));
        engine.submit(&area, Way::Write, 0, bytes, filled(bytes, 5)).wait().unwrap();
        let back = engine.submit(&area, Way::Read, 0, bytes, filled(bytes, 6)).wait().unwrap();
        assert_eq!(back.bytes(), filled(bytes, 5).bytes());
        let mut page = [0; 4096];
        let at = HEADER_BYTES + 3 * MIB as u64;
        open(&reserved.path).read_exact_at(&mut page, at).unwrap();
        assert_eq!(page, filled(bytes, 5).bytes()[3 * MIB..3 * MIB + 4096]);
    }
}

#[test]
fn many_requests_of_many_threads_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = 2 * MIB + 333;
    for (i, options) in all_ways(dir.path(), 40 * MIB).enumerate() {
        let delays = Some(Delays::new(i as u64, Duration::from_millis(3)));
        let file = StateFile::create(StateFileOptions { delays, ..options }).unwrap();
        let arena = Arena::new("host", None);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (file, arena) = (&file, &arena);
                scope.spawn(move || {
                    let regions: Vec<_> = (0..4).map(|_| file.allocate(bytes, "state").unwrap()).collect();
                    let buffer = || arena.alloc_dirty(DType::U8, bytes, "test").unwrap();
                    for round in 0..3 {
                        let seed = |i: usize| thread * 1000 + round * 100 + i as u64;
                        let writes = regions.iter().enumerate().map(|(i, region)| {
                            let mut from = buffer();
                            from.bytes_mut().copy_from_slice(filled(bytes, seed(i)).bytes());
                            region.write(0, bytes, from)
                        });
                        let writes: Vec<_> = writes.collect();
                        writes.into_iter().for_each(|write| drop(write.wait().unwrap()));
                        let reads: Vec<_> = regions.iter().map(|region| region.read(0, bytes, buffer())).collect();
                        for (i, read) in reads.into_iter().enumerate() {
                            assert_eq!(read.wait().unwrap().bytes(), filled(bytes, seed(i)).bytes());
                        }
                    }
                });
            }
        });
        assert_eq!(arena.usage().used, 0);
    }
}

#[test]
fn requests_that_nobody_waits_for_are_done_before_the_file_goes() {
    let dir = tempfile::tempdir().unwrap();
    for options in all_ways(dir.path(), 8 * MIB) {
        let delays = Some(Delays::new(3, Duration::from_millis(2)));
        let file = StateFile::create(StateFileOptions { delays, ..options }).unwrap();
        let region = file.allocate(6 * MIB, "state").unwrap();
        let pending: Vec<_> = (0..6).map(|i| region.write(i * MIB, MIB, filled(MIB, 1))).collect();
        drop((file, region));
        pending.into_iter().for_each(|write| drop(write.wait().unwrap()));
    }
}

#[test]
fn a_flipped_bit_is_an_error_that_names_the_block() {
    let dir = tempfile::tempdir().unwrap();
    for options in all_ways(dir.path(), 8 * MIB) {
        let file = StateFile::create(options).unwrap();
        file.allocate(5000, "the first").unwrap();
        let region = file.allocate(3 * MIB + 100, "unet.mid_block").unwrap();
        let written = region.write(0, region.bytes(), filled(region.bytes(), 1)).wait().unwrap();
        for (at, block) in [(3 * MIB as u64 + 99, 3), (MIB as u64 + 17, 1)] {
            let place = HEADER_BYTES + StateFile::room(5000) + at;
            let mut byte = [0];
            behind_its_back(&file).read_exact_at(&mut byte, place).unwrap();
            assert_eq!(byte[0], written.bytes()[at as usize]);
            behind_its_back(&file).write_all_at(&[byte[0] ^ 4], place).unwrap();
            let told = error(region.read(0, region.bytes(), filled(region.bytes(), 2)));
            let name = file.path().display().to_string();
            for part in ["unet.mid_block", &format!("block {block} "), &name, "go on from the last checkpoint"] {
                assert!(told.to_lowercase().contains(&part.to_lowercase()), "{told}");
            }
            // What is whole can still be read, and the block written anew.
            drop(region.read(0, MIB, filled(MIB, 2)).wait().unwrap());
            behind_its_back(&file).write_all_at(&byte, place).unwrap();
            drop(region.read(0, region.bytes(), filled(region.bytes(), 2)).wait().unwrap());
        }
    }
}

#[test]
fn a_file_that_someone_has_shortened_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for options in all_ways(dir.path(), 8 * MIB) {
        let file = StateFile::create(options).unwrap();
        let region = file.allocate(4 * MIB, "state").unwrap();
        region.write(0, 4 * MIB, filled(4 * MIB, 1)).wait().unwrap();
        for length in [2 * MIB as u64 + 12345, HEADER_BYTES, 0] {
            behind_its_back(&file).set_len(length).unwrap();
            let told = error(region.read(0, 4 * MIB, filled(4 * MIB, 2)));
            assert!(told.contains("shortened") && told.contains("of state"), "{told}");
        }
        // Longer again, with zeros.
        behind_its_back(&file).set_len(9 * MIB as u64).unwrap();
        assert!(error(region.read(0, MIB, filled(MIB, 2))).contains("checksum"));
    }
}

#[test]
fn what_was_never_written_or_is_being_written_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let delays = Some(Delays::new(0, Duration::from_millis(50)));
    let file = StateFile::create(StateFileOptions { delays, ..options(dir.path(), 8 * MIB) }).unwrap();
    let region = file.allocate(3 * MIB, "state").unwrap();
    region.write(0, MIB, filled(MIB, 1)).wait().unwrap();
    let told = error(region.read(0, 2 * MIB, filled(2 * MIB, 2)));
    assert!(told.contains("block 1 of state") && told.contains("before it was ever written"), "{told}");
    // Before it began at all, or while it is under way.
    let under_way: Vec<_> = (0..20).map(|_| region.write(2 * MIB, MIB, filled(MIB, 1))).collect();
    let told: Vec<_> = under_way.into_iter().filter_map(|write| write.wait().err()).collect();
    assert!(told.iter().all(|e| e.to_string().contains("before the write before it was done")));
    // Requests that do not fit.
    for (at, bytes) in [(1, 10), (MIB, 2 * MIB + 1), (4 * MIB, 1), (0, 10), (usize::MAX - MIB + 1, MIB)] {
        assert!(region.write(at, bytes, filled(3 * MIB, 1)).wait().is_err(), "{at} {bytes}");
    }
    assert!(region.read(0, MIB, filled(MIB - 1, 1)).wait().is_err());
    assert!(file.allocate(8 * MIB, "more").unwrap_err().to_string().contains("more"));
    assert!(region.read(0, 0, filled(0, 1)).wait().is_ok());
}

#[test]
fn a_drive_that_is_full_after_all_says_so_and_hangs_nothing() {
    let full = Arc::new(open(Path::new("/dev/full")));
    for ring in [false, true] {
        let tuning = Tuning { depth: 2, block: MIB, direct: false, ring };
        let common = Common { piece_bytes: MIB, meter: Arc::default(), delays: None };
        let Ok(engine) = Engine::start(&full, &tuning, common) else { continue };
        let area = Arc::new(Area::new("/mnt/state.bin".into(), "state", HEADER_BYTES, 4 * MIB));
        let writes: Vec<_> = (0..4).map(|i| engine.submit(&area, Way::Write, i * MIB, MIB, filled(MIB, 1))).collect();
        for write in writes {
            let told = error(write);
            assert!(told.contains("/mnt/state.bin") && told.contains("make room"), "{told}");
        }
        let told = error(engine.submit(&area, Way::Read, 0, MIB, filled(MIB, 1)));
        assert!(told.contains("failed to arrive"), "{told}");
    }
}

#[test]
fn files_of_dead_runs_are_removed_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let living = StateFile::create(options(dir.path(), MIB)).unwrap();
    let region = living.allocate(MIB, "state").unwrap();
    region.write(0, MIB, filled(MIB, 1)).wait().unwrap();
    let at = |name: &str| dir.path().join(name);
    // As a killed process leaves it, and one killed a little earlier.
    std::fs::copy(living.path(), at("dblaunch-state-1-00-rank-0.bin")).unwrap();
    File::create(at("dblaunch-state-2-00-rank-0.bin")).unwrap();
    // Foreign: by name, by contents, by kind.
    std::fs::copy(living.path(), at("state-1-00-rank-0.bin")).unwrap();
    std::fs::write(at("dblaunch-state-3-00-rank-0.bin"), b"something else that is long enough").unwrap();
    std::fs::write(at("dblaunch-state-4-00-rank-0.bin"), b"short").unwrap();
    std::fs::create_dir(at("dblaunch-state-5-00-rank-0.bin")).unwrap();
    std::os::unix::fs::symlink(at("state-1-00-rank-0.bin"), at("dblaunch-state-6-00-rank-0.bin")).unwrap();
    let second = StateFile::create(options(dir.path(), MIB)).unwrap();
    let mut left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.retain(|name| *name != living.path().file_name().unwrap().to_str().unwrap());
    left.retain(|name| *name != second.path().file_name().unwrap().to_str().unwrap());
    left.sort();
    let names = [3, 4, 5, 6].map(|i| format!("dblaunch-state-{i}-00-rank-0.bin"));
    assert_eq!(left, [&names[..], &["state-1-00-rank-0.bin".to_string()]].concat());
    assert_eq!(region.read(0, MIB, filled(MIB, 2)).wait().unwrap().bytes(), filled(MIB, 1).bytes());
    let path = second.path().to_path_buf();
    drop(second);
    assert!(!path.exists() && living.path().exists());
}

#[test]
fn many_runs_begin_in_one_folder_at_once() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for rank in 0..8 {
            let dir = dir.path();
            scope.spawn(move || {
                for _ in 0..5 {
                    let file = StateFile::create(StateFileOptions { rank, ..options(dir, MIB) }).unwrap();
                    let region = file.allocate(MIB, "state").unwrap();
                    region.write(0, MIB, filled(MIB, 1)).wait().unwrap();
                    assert!(file.path().exists());
                    region.read(0, MIB, filled(MIB, 1)).wait().unwrap();
                }
            });
        }
    });
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_will_not_do_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |options: StateFileOptions| {
        let error = StateFile::create(options).unwrap_err();
        assert!(error.is::<Refusal>(), "{error:?}");
        error.to_string()
    };
    let told = refused(options(&dir.path().join("missing"), MIB));
    assert!(told.contains("missing") && told.contains("nvme_dir"), "{told}");
    let file = dir.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    assert!(refused(options(&file, MIB)).contains("not a folder"));
    assert!(refused(options(&file.join("below"), MIB)).contains("below"));
    let told = refused(StateFileOptions { bytes: 1 << 60, ..options(dir.path(), 0) });
    assert!(told.contains("1.0 EiB") && told.contains("are free") && told.contains("rank 0"), "{told}");
    assert!(refused(StateFileOptions { bytes: u64::MAX, ..options(dir.path(), 0) }).contains("are free"));
    // The kernel's own, which nobody can write to, nor has room.
    #[cfg(target_os = "linux")]
    assert!(refused(options(Path::new("/proc/self"), MIB)).contains("0 B are free"));
    // A folder that may only be read, to everybody but root.
    let closed = dir.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o555)).unwrap();
    if File::create(closed.join("probe")).is_err() {
        assert!(refused(options(&closed, MIB)).contains("no file can be made"));
    }
    std::fs::remove_dir_all(&closed).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left of what was refused");
}
