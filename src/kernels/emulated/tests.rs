//! The emulator itself, on the kernels of kernels/emulate/probes.cu.

use half::{bf16, f16};

use super::*;

const GRID: Grid = Grid { blocks: [4, 1, 1], threads: 64, shared: 256 };

/// The emulator knows kernels by their names alone.
fn run(launcher: &Emulated, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
    launcher.launch(Family::Reduce, kernel, grid, args)
}

#[test]
fn barriers_and_sums_work_in_every_order() {
    let x: Vec<f32> = (0..250).map(|i| (i % 17) as f32).collect();
    for launcher in Emulated::each().unwrap() {
        let (from, to) = (Values::new(&x).unwrap(), Values::<f32>::unwritten(250).unwrap());
        run(&launcher, "probe_sums", GRID, &[from.address().into(), to.address().into(), 250.into()]).unwrap();
        for (i, y) in to.get().into_iter().enumerate() {
            let block = &x[i / 64 * 64..(i / 64 * 64 + 64).min(250)];
            assert_eq!(y, block.iter().sum::<f32>(), "{i}");
        }
    }
}

#[test]
fn faults_are_errors_that_name_them() {
    for launcher in Emulated::each().unwrap() {
        let try_out = |fault: i32| {
            let to = Values::<f32>::unwritten(256).unwrap();
            run(&launcher, "probe_faults", GRID, &[to.address().into(), fault.into()]).map(|()| to.get())
        };
        let want: Vec<f32> = (0..256).map(|i| ((i + 1) % 64) as f32).collect();
        assert_eq!(try_out(0).unwrap(), want);
        // Right by chance for most threads, in no order for all.
        assert_ne!(try_out(1).unwrap(), want);
        let messages = [
            (2, "waits at"),
            (3, "thread 5 waits for lanes ffffffff in __syncwarp"),
            (4, "not its memory"),
            (5, "index 64 of an array 'float [64]'"),
            (6, "not aligned to 16 bytes"),
            (7, "not its memory"),
            (8, "is not among the lanes 0f0f0f0f"),
            (9, "not its memory"),
        ];
        for (fault, message) in messages {
            let error = try_out(fault).unwrap_err().to_string();
            assert!(error.starts_with("probe_faults, block (") && error.contains(message), "{fault}: {error}");
        }
    }
}

#[test]
fn arguments_are_checked() {
    let launcher = Emulated::new(80, Order::Ascending).unwrap();
    let error = |kernel, args: &[Arg]| run(&launcher, kernel, GRID, args).unwrap_err().to_string();
    assert_eq!(error("no_such_kernel", &[]), "there is no kernel no_such_kernel");
    assert_eq!(error("probe_warps", &[]), "probe_warps takes 1 arguments, was given 0");
    assert_eq!(error("probe_warps", &[Arg::U64(0)]), "probe_warps: argument 0 is an address, was given a u64");
    let grid = Grid { threads: 1025, ..GRID };
    assert!(run(&launcher, "probe_warps", grid, &[Address::NULL.into()]).is_err());
}

#[test]
fn tensor_cores_multiply_and_conflicts_are_counted() {
    let numbers = |n: usize| (0..n).map(|i| (i * 7 % 13) as f32 / 4.0 - 1.5).collect::<Vec<f32>>();
    let (a, b) = (numbers(256), numbers(128));
    let want: Vec<f32> = (0..128).map(|i| (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum::<f32>()).collect();
    let grid = |room: usize| Grid { blocks: [1, 1, 1], threads: 64, shared: 32 * room as u32 * 2 };
    for launcher in Emulated::each().unwrap() {
        let halves = [
            Values::new(&a.iter().map(|&x| f16::from_f32(x).to_bits()).collect::<Vec<u16>>()).unwrap(),
            Values::new(&b.iter().map(|&x| f16::from_f32(x).to_bits()).collect::<Vec<u16>>()).unwrap(),
            Values::new(&a.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>()).unwrap(),
            Values::new(&b.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<u16>>()).unwrap(),
        ];
        let go = |kernel, a: &Values<u16>, b: &Values<u16>, room: usize| {
            let y = Values::<f32>::unwritten(128).unwrap();
            let args = [a.address().into(), b.address().into(), y.address().into(), (room as i32).into()];
            run(&launcher, kernel, grid(room), &args).map(|()| y.get())
        };
        assert_eq!(go("probe_product_f16", &halves[0], &halves[1], 24).unwrap(), want);
        // Rows of 48 bytes fall on all banks.
        assert_eq!(launcher.bank_conflicts(), 1.0);
        assert_eq!(go("probe_product_f16", &halves[0], &halves[1], 64).unwrap(), want);
        assert!(launcher.bank_conflicts() > 4.0);
        let product = go("probe_product_bf16", &halves[2], &halves[3], 24);
        match launcher.capability() {
            75 => assert!(product.unwrap_err().to_string().contains("no products of bf16 before 8.0")),
            _ => assert_eq!(product.unwrap(), want),
        }
    }
}

#[test]
fn copies_arrive_when_they_are_waited_for() {
    let x: Vec<f32> = (1..=128).map(|i| i as f32).collect();
    for (capability, waited, arrived) in [(80, 2, 128), (80, 1, 64), (80, 0, 0), (75, 0, 128)] {
        let launcher = Emulated::new(capability, Order::Ascending).unwrap();
        let (from, to) = (Values::new(&x).unwrap(), Values::<f32>::unwritten(128).unwrap());
        let grid = Grid { shared: 512, ..GRID };
        run(&launcher, "probe_copies", grid, &[from.address().into(), to.address().into(), waited.into()]).unwrap();
        for (i, y) in to.get().into_iter().enumerate() {
            let want = if i >= 64 && i % 2 == 0 { 0.0 } else { x[i] };
            assert_eq!(y.to_bits(), if i < arrived { want.to_bits() } else { u32::MAX }, "{i}");
        }
    }
}

#[test]
fn parts_of_warps_meet() {
    for launcher in Emulated::each().unwrap() {
        let y = Values::<i32>::unwritten(256).unwrap();
        let grid = Grid { blocks: [1, 1, 1], threads: 40, shared: 0 };
        run(&launcher, "probe_warps", grid, &[y.address().into()]).unwrap();
        let y = y.get();
        for t in 0..40 {
            let lane = t % 32;
            let down = if lane % 8 + 2 < 8 { lane + 2 } else { lane };
            let up = if lane % 8 >= 3 { lane - 3 } else { lane };
            assert_eq!(y[t], (down + if lane < 8 { 1000 * (lane ^ 4) } else { 0 }) as i32);
            assert_eq!(y[64 + t], up as i32);
            assert_eq!(y[128 + t], (lane / 4 * 4 + 1) as i32);
            assert_eq!(y[192 + t] as u32, if t < 32 { 0x49249249 } else { 0x49 });
        }
        // Nobody wrote the rest.
        assert!(y[40..64].iter().all(|&y| y == -1));
    }
}
