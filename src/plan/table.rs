//! The plan as a table: what each tier holds at most, what travels in a step, and why.

use std::fmt;

use super::cards::Machine;
use super::decision::Decision;
use super::ledger::TierBytes;
use crate::segment::Keep;

/// Bytes with three digits or so.
pub fn size(bytes: usize) -> String {
    let gib = bytes as f64 / (1u64 << 30) as f64;
    match bytes {
        0 => "-".to_string(),
        _ if gib >= 100.0 => format!("{gib:.0} GiB"),
        _ if gib >= 1.0 => format!("{gib:.2} GiB"),
        _ if bytes >= 1 << 20 => format!("{:.0} MiB", bytes as f64 / (1u64 << 20) as f64),
        _ => format!("{:.0} KiB", (bytes as f64 / 1024.0).ceil()),
    }
}

/// A decision with what it is about.
pub struct Table<'a> {
    pub decision: &'a Decision,
    pub machine: &'a Machine,
    pub world_size: usize,
    /// Parameters that train.
    pub trained: usize,
    pub rows: usize,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decision { stage, placement, keep, prediction, .. } = self.decision;
        let bytes = &prediction.bytes;
        writeln!(
            f,
            "{:.1} M parameters train on {}, {} rank{}, {} picture{} a micro-batch and rank",
            self.trained as f64 / 1e6,
            self.machine.name,
            self.world_size,
            if self.world_size == 1 { "" } else { "s" },
            self.rows,
            if self.rows == 1 { "" } else { "s" },
        )?;
        let kept = keep.iter().filter(|keep| **keep == Keep::Graph).count();
        writeln!(
            f,
            "stage {stage}; parameters on {}, gradients on {}, optimizer state on {}; {kept} of {} graphs kept",
            placement.parameters,
            placement.gradients,
            placement.optimizer,
            keep.len()
        )?;
        writeln!(f)?;
        let head =
            ["at most, per rank", "parameters", "gradients", "optimizer", "activations", "frozen", "total", "budget"];
        row(f, head.map(str::to_string))?;
        tier(f, "device", &bytes.device, self.decision.device_limit)?;
        tier(f, "host", &bytes.host, self.decision.host_limit)?;
        if bytes.drive > 0 {
            writeln!(f, "{:<18}{:>12} in the state file", "nvme", size(bytes.drive))?;
        }
        writeln!(f)?;
        let traffic = &bytes.traffic;
        writeln!(
            f,
            "travels in a step   to device {}, to host {}, read from nvme {}, written {}, between ranks {}",
            size(traffic.to_device),
            size(traffic.to_host),
            size(traffic.read),
            size(traffic.written),
            size(traffic.between_ranks)
        )?;
        let s = &prediction.seconds;
        writeln!(
            f,
            "a step takes about  {} (forward {}, backward {}, update {}, copies {}, drive {}, ranks {}; they overlap)",
            time(s.step),
            time(s.forward),
            time(s.backward),
            time(s.update),
            time(s.bus),
            time(s.drive),
            time(s.between_ranks)
        )?;
        writeln!(f, "fullest in the      {}", bytes.fullest)?;
        for (i, reason) in self.decision.reasons.iter().enumerate() {
            writeln!(f, "{:<20}{reason}", if i == 0 { "because" } else { "" })?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, cells: [String; 8]) -> fmt::Result {
    let [first, rest @ ..] = cells;
    write!(f, "{first:<18}")?;
    for cell in rest {
        write!(f, "{cell:>12}")?;
    }
    writeln!(f)
}

fn tier(f: &mut fmt::Formatter<'_>, name: &str, bytes: &TierBytes, budget: Option<u64>) -> fmt::Result {
    let parts = [bytes.parameters, bytes.gradients, bytes.optimizer, bytes.activations, bytes.frozen, bytes.total];
    let [a, b, c, d, e, total] = parts.map(size);
    row(f, [name.to_string(), a, b, c, d, e, total, budget.map_or("-".to_string(), |budget| size(budget as usize))])
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => "-".to_string(),
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.1} s"),
        s => format!("{:.0} ms", (s * 1000.0).max(1.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_about_three_digits() {
        assert_eq!(
            [0, 1, 5 << 20, 1 << 30, 24 << 30, 500 << 30].map(size),
            ["-", "1 KiB", "5 MiB", "1.00 GiB", "24.00 GiB", "500 GiB"]
        );
        assert_eq!([0.0, 0.0001, 0.25, 1.5, 200.0].map(time), ["-", "1 ms", "250 ms", "1.5 s", "200 s"]);
    }
}
