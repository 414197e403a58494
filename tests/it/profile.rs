//! `--profile`: a trace of all ranks and a table of where the time went.

use std::fs;

use serde_json::Value;

use crate::harness::{Home, PLAIN, rows};

#[test]
fn two_ranks_leave_one_trace_and_a_table_and_train_the_same() {
    let home = Home::new();
    let job = || home.job(PLAIN).ranks(2).sets(&["zero.stage=3", "train.recompute=true"]);
    let ran = job().words(&["--profile", "2"]).run().done();
    let file: Value = serde_json::from_str(&fs::read_to_string(home.out().join("profile.json")).unwrap()).unwrap();
    let all = file["traceEvents"].as_array().unwrap();
    let spans: Vec<&Value> = all.iter().filter(|e| e["ph"] == "X").collect();
    for rank in [0, 1] {
        let names: Vec<&str> = spans.iter().filter(|e| e["pid"] == rank).map(|e| e["name"].as_str().unwrap()).collect();
        let steps: Vec<&&str> = names.iter().filter(|name| name.starts_with("step ")).collect();
        assert_eq!(steps, [&"step 2", &"step 3"], "after one that warms up");
        for kind in ["forward unet.", "recompute unet.", "backward unet.", "loss", "update unet.", "all-gather"] {
            let found = names.iter().filter(|name| name.starts_with(kind)).count();
            assert!(found >= 1, "rank {rank} has {found} of {kind}: {names:?}");
        }
        let gathered = spans.iter().find(|e| e["pid"] == rank && e["name"] == "all-gather").unwrap();
        assert!(gathered["args"]["bytes"].as_u64() > Some(0), "{gathered}");
    }
    // Spans of one row are apart or inside one another, or no viewer could draw them.
    for a in &spans {
        let row = spans.iter().filter(|b| b["pid"] == a["pid"] && b["tid"] == a["tid"]);
        let ends = |e: &Value| (e["ts"].as_f64().unwrap(), e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap());
        let ((a0, a1), slack) = (ends(a), 0.002);
        for (b0, b1) in row.map(|b| ends(b)) {
            assert!(b1 <= a0 + slack || b0 + slack >= a1 || (b0 >= a0 - slack) == (b1 <= a1 + slack), "{a}");
        }
    }
    let table = fs::read_to_string(home.out().join("profile.txt")).unwrap();
    for piece in ["rank 0, step 2 to step 3: ", "rank 1, ", "% of it waiting", "compute: forward", "collectives"] {
        assert!(table.contains(piece), "{table}");
    }
    ran.says("% of it waiting");
    let profiled = rows(&home.out());
    job().set("output.overwrite=true").run().done();
    assert_eq!(rows(&home.out()), profiled);
}

#[test]
fn a_run_that_is_shorter_than_its_profile_leaves_what_there_is() {
    let home = Home::new();
    home.job(PLAIN).set("train.max_steps=3").words(&["--profile", "9"]).run().done().says("rank 0, step 2 to step 3");
    let ran = home.job(PLAIN).sets(&["train.max_steps=1", "output.dir=HOME/short"]).words(&["--profile", "9"]).run();
    ran.done().says("nothing to profile");
    assert!(!home.path("short").join("profile.json").exists());
}

#[test]
fn copies_and_a_drive_have_rows_of_their_own() {
    let home = Home::new();
    fs::create_dir(home.path("drive")).unwrap();
    let tiers = ["zero.offload_params=nvme", "zero.offload_optimizer=nvme", "zero.nvme_dir=HOME/drive"];
    home.job(PLAIN).sets(&tiers).words(&["--profile", "2"]).run().done();
    let file: Value = serde_json::from_str(&fs::read_to_string(home.out().join("profile.json")).unwrap()).unwrap();
    let all = file["traceEvents"].as_array().unwrap();
    let rows: Vec<&str> =
        all.iter().filter(|e| e["name"] == "thread_name").map(|e| e["args"]["name"].as_str().unwrap()).collect();
    for row in ["compute", "optimizer: optimizer", "copies: traffic", "disk: drive"] {
        assert!(rows.contains(&row), "no {row}: {rows:?}");
    }
    for name in ["read unet.mid_block", "write unet.mid_block", "bring unet.mid_block"] {
        let found = all.iter().find(|e| e["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        assert!(found["args"]["bytes"].as_u64() > Some(0), "{found}");
    }
    let table = fs::read_to_string(home.out().join("profile.txt")).unwrap();
    assert!(["optimizer", "copies", "disk", "waiting"].iter().all(|line| table.contains(line)), "{table}");
}
