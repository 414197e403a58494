//! Numbers, sizes and times as people read them.

/// Four significant digits, without trailing zeros; very large and very small ones with an exponent.
pub fn value(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "not a number".to_string() } else { "infinite".to_string() };
    }
    let size = value.abs();
    if size == 0.0 {
        return "0".to_string();
    }
    let text = if (1e-3..1e6).contains(&size) {
        let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        grouped(&trimmed(&format!("{size:.digits$}")))
    } else {
        return exponential(value);
    };
    if value < 0.0 { format!("−{text}") } else { text }
}

/// As in "2.5e−4".
pub fn exponential(value: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let text = format!("{value:.3e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", trimmed(mantissa)).replace('-', "−")
}

/// Without zeros at the end of a fraction.
pub fn trimmed(text: &str) -> String {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text.to_string(),
    }
}

/// With commas between thousands.
pub fn grouped(text: &str) -> String {
    let (whole, fraction) = text.split_once('.').map_or((text, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut out = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    fraction.map_or(out.clone(), |fraction| format!("{out}.{fraction}"))
}

pub fn count(number: u64) -> String {
    grouped(&number.to_string())
}

/// As in "1.5 GiB".
pub fn bytes(bytes: f64) -> String {
    let (unit, size) = byte_unit(bytes);
    format!("{} {unit}", value(bytes / size))
}

/// The unit that fits `bytes`, and its size.
pub fn byte_unit(bytes: f64) -> (&'static str, f64) {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let fits = units.into_iter().map(|(unit, power)| (unit, f64::from(1u32 << power)));
    fits.into_iter().find(|(_, size)| bytes >= *size).unwrap_or(("B", 1.0))
}

/// As in "2 h 5 min": two units at most.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3_600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if seconds < 10.0 => format!("{} s", value((seconds * 10.0).round() / 10.0)),
        (0, 0, 0) => format!("{whole} s"),
        (0, 0, _) if whole.is_multiple_of(60) => format!("{minutes} min"),
        (0, 0, _) => format!("{minutes} min {} s", whole % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_exact_enough() {
        let cases = [
            (0.0, "0"),
            (1.0, "1"),
            (-0.25, "−0.25"),
            (0.96064774, "0.9606"),
            (15.356763, "15.36"),
            (999_999.6, "1,000,000"),
            (123_456.7, "123,457"),
            (8.15448e-7, "8.154e−7"),
            (5e-6, "5e−6"),
            (0.001, "0.001"),
            (2.5e9, "2.5e9"),
            (f64::INFINITY, "infinite"),
        ];
        for (number, text) in cases {
            assert_eq!(value(number), text);
        }
        assert_eq!(count(1234567), "1,234,567");
    }

    #[test]
    fn sizes_and_times_have_fitting_units() {
        assert_eq!(bytes(59_379_712.0), "56.63 MiB");
        assert_eq!(bytes(14.0), "14 B");
        assert_eq!(byte_unit(3e9).0, "GiB");
        let times = [
            (0.26, "0.3 s"),
            (16.4, "16 s"),
            (125.0, "2 min 5 s"),
            (1500.0, "25 min"),
            (7500.0, "2 h 5 min"),
            (2e5, "2 d 7 h"),
        ];
        for (seconds, text) in times {
            assert_eq!(duration(seconds), text);
        }
    }
}
