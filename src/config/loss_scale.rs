//! The keys of `[train]` that say how the loss is scaled under fp16; named as in DeepSpeed's `fp16` section.

use super::plan::Writer;
use super::reader::Reader;
use super::train::MixedPrecision;
use crate::optim::ScalePolicy;

const KEYS: [&str; 4] = ["loss_scale", "initial_scale_power", "loss_scale_window", "min_loss_scale"];

/// None but under fp16.
pub(super) fn read(section: &Reader, precision: MixedPrecision) -> Option<ScalePolicy> {
    if precision != MixedPrecision::Fp16 {
        for key in KEYS.into_iter().filter(|key| section.is_set(key)) {
            section.reject(key, "only mixed_precision = \"fp16\" scales the loss: set that, or leave this out");
        }
        return None;
    }
    // The scale reaches kernels as f32; from 2^100 on nothing but overflow can come of it.
    let power = section.count("initial_scale_power", 0).unwrap_or(16);
    if power > 100 {
        section.reject("initial_scale_power", "the scale begins at 2 to this power, and 100 is the most");
    }
    let window = section.count("loss_scale_window", 1).unwrap_or(2000) as u64;
    let minimum = section.factor("min_loss_scale").unwrap_or(1.0);
    let start = (power.min(100) as f64).exp2();
    if minimum > start {
        section.reject("min_loss_scale", &format!("the scale begins at {start}, below its minimum: lower this"));
    }
    let fixed = section.scale("loss_scale");
    if fixed.is_some() {
        for key in KEYS[1..].iter().filter(|key| section.is_set(key)) {
            section.reject(key, "loss_scale fixes the scale, and this is for \"dynamic\": leave one of them out");
        }
    }
    Some(fixed.map_or(ScalePolicy::Dynamic { start, window, minimum }, ScalePolicy::Fixed))
}

pub(super) fn write(policy: Option<ScalePolicy>, to: Writer) -> Writer {
    match policy {
        None => to,
        Some(ScalePolicy::Fixed(scale)) => to.put("loss_scale", scale),
        Some(ScalePolicy::Dynamic { start, window, minimum }) => to
            .put("loss_scale", "dynamic")
            .put_count("initial_scale_power", start.log2() as usize)
            .put_count("loss_scale_window", window as usize)
            .put("min_loss_scale", minimum),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Draft;
    use super::*;

    fn parse(train: &str) -> Draft {
        let text = format!(
            "[model]\npath = \"m\"\n[data]\ninstance_dir = \"d\"\ninstance_prompt = \"p\"\n[output]\ndir = \"o\"\n[train]\n{train}"
        );
        Draft::parse("train.toml", &text, &[], 1).unwrap()
    }

    #[test]
    fn the_scale_is_read_and_written() {
        let dynamic = |start, window, minimum| Some(ScalePolicy::Dynamic { start, window, minimum });
        for (text, want) in [
            ("", None),
            ("mixed_precision = \"fp16\"", dynamic(65536.0, 2000, 1.0)),
            (
                "mixed_precision = \"fp16\"\nloss_scale = \"dynamic\"\nmin_loss_scale = 0.25",
                dynamic(65536.0, 2000, 0.25),
            ),
            ("mixed_precision = \"fp16\"\ninitial_scale_power = 3\nloss_scale_window = 5", dynamic(8.0, 5, 1.0)),
            ("mixed_precision = \"fp16\"\nloss_scale = 128", Some(ScalePolicy::Fixed(128.0))),
            ("mixed_precision = \"fp16\"\nloss_scale = 0", dynamic(65536.0, 2000, 1.0)),
        ] {
            let draft = parse(text);
            assert_eq!((draft.plan.train.loss_scale, &draft.problems[..]), (want, &[][..]), "{text}");
            let again = Draft::parse("config.toml", &draft.plan.to_toml().unwrap(), &[], 1).unwrap();
            assert_eq!((again.plan, again.problems), (draft.plan, vec![]), "{text}");
        }
    }

    #[test]
    fn a_scale_that_cannot_be_is_refused() {
        for (text, words) in [
            ("loss_scale = 128", "only mixed_precision = \"fp16\""),
            ("mixed_precision = \"bf16\"\nmin_loss_scale = 1", "only mixed_precision = \"fp16\""),
            ("mixed_precision = \"fp16\"\nloss_scale = \"dynamical\"", "\"dynamic\""),
            ("mixed_precision = \"fp16\"\nloss_scale = -1", "above 0"),
            ("mixed_precision = \"fp16\"\nloss_scale = 1e-300", "from 8e-31 to 1.2e30"),
            ("mixed_precision = \"fp16\"\nloss_scale = 1e39", "from 8e-31 to 1.2e30"),
            ("mixed_precision = \"fp16\"\nmin_loss_scale = 1e-300", "from 8e-31 to 1.2e30"),
            ("mixed_precision = \"fp16\"\nloss_scale = 1\nloss_scale_window = 3", "leave one of them out"),
            ("mixed_precision = \"fp16\"\ninitial_scale_power = 101", "100 is the most"),
            ("mixed_precision = \"fp16\"\ninitial_scale_power = 2\nmin_loss_scale = 5", "below its minimum"),
        ] {
            let problems = parse(text).problems;
            assert!(problems.len() == 1 && problems[0].contains(words), "{text}: {problems:?}");
        }
    }
}
