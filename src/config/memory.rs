//! `[memory]`: how much memory a rank may take; the planner keeps within it and the arenas enforce it.

use bytesize::ByteSize;

use super::plan::Writer;
use super::reader::Reader;

/// Budgets in bytes; `None`: what the machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Of the device tier of one rank. Where the CPU computes this is the process's own memory: arenas and activations.
    pub vram: Option<u64>,
    /// Of the host tier of all ranks on this machine together.
    pub ram: Option<u64>,
}

impl MemoryPlan {
    pub(super) fn read(section: &Reader) -> Self {
        let size = |key: &str| {
            let text = section.text(key)?;
            let size = parse_size(&text);
            if let Err(what) = &size {
                section.reject(key, what);
            }
            size.ok()
        };
        Self { vram: size("vram"), ram: size("ram") }
    }

    /// Nothing if there are no budgets.
    pub(super) fn write(&self) -> Option<toml::Table> {
        // To the byte: a rounded size would be another one.
        let text = |size: Option<u64>| size.map(|bytes| format!("{bytes}B"));
        (*self != Self::default())
            .then(|| Writer::default().put_some("vram", text(self.vram)).put_some("ram", text(self.ram)).finish())
    }
}

/// "8GiB" (2^30 bytes), "8GB" (10^9), "512 MiB", "1048576" or "1048576B". What is wrong with another text, otherwise.
pub fn parse_size(text: &str) -> Result<u64, String> {
    match text.trim().parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err("a budget of nothing holds nothing: leave it out for all that there is".to_string()),
        Ok(ByteSize(bytes)) => Ok(bytes),
        Err(_) => {
            Err("this is no size: write a number and a unit, as in \"8GiB\" (2^30 bytes) or \"8GB\" (10^9)".to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("8 GB"), Ok(8_000_000_000));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("8589934592B"), Ok(8 << 30));
        assert!(parse_size("").is_err() && parse_size("much").is_err() && parse_size("-1GiB").is_err());
        assert!(parse_size("0GiB").unwrap_err().contains("nothing"));
    }
}
