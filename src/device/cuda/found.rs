//! Whether a rank can use the GPU it is to use, from what the driver says of itself and of the GPUs: decisions and their
//! words only, so that they are tested without either.

/// The oldest generation whose kernels can be built: Turing.
pub const OLDEST: u32 = 75;

/// From this generation on kernels have instructions that older code does without: what is launched depends on the GPU.
const NEWER: u32 = 80;

/// What the program was built with.
#[derive(Clone, Debug)]
pub struct Built {
    /// The CUDA, as the driver numbers versions.
    pub toolkit: u32,
    /// The generations that there is code for, in order; for the last one in a form that drivers translate for newer ones.
    pub code: Vec<u32>,
}

impl Built {
    /// The generation whose code runs on a GPU of this one.
    fn code_for(&self, capability: u32) -> Option<u32> {
        let own = |&&code: &&u32| code <= capability && code / 10 == capability / 10;
        let translated = || self.code.last().copied().filter(|&last| last <= capability);
        self.code.iter().filter(own).max().copied().or_else(translated)
    }
}

/// What the driver answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The newest CUDA that the driver knows, as it numbers them: 13.0 is 13000.
    pub driver: u32,
    /// Why the driver does not start, as its number for it.
    pub refuses: Option<u32>,
    pub cards: Vec<Card>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    pub name: String,
    /// Major and minor, times 10.
    pub capability: u32,
    /// Tells GPUs apart, in all processes alike.
    pub uuid: [u8; 16],
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory: usize,
}

/// Which of the GPUs that this process sees a rank uses: its place on this machine. Where every rank sees one GPU alone
/// (Slurm's --gpus-per-task), that one.
pub fn ordinal(local_rank: usize, cards: usize) -> usize {
    if cards == 1 { 0 } else { local_rank }
}

/// The GPU a rank is to use, or in one paragraph why it cannot and what to do.
pub fn choose<'f>(found: &'f Found, local_rank: usize, built: &Built) -> Result<(usize, &'f Card), String> {
    let toolkit = built.toolkit;
    if let Some(code) = found.refuses {
        return Err(refusal(code));
    }
    if found.driver < toolkit {
        return Err(format!(
            "the NVIDIA driver is too old: it knows CUDA {} and this program was built with {}. Install a driver of series \
             {} or newer (`nvidia-smi` shows the series), or build with a toolkit that is not newer than the driver",
            version(found.driver),
            version(toolkit),
            series(toolkit)
        ));
    }
    let count = found.cards.len();
    let ordinal = ordinal(local_rank, count);
    let Some(card) = found.cards.get(ordinal) else {
        return Err(match count {
            0 => no_gpu(),
            _ => format!(
                "rank {local_rank} of this machine would use GPU {local_rank}, but there are {count} GPUs (0 to {}): start at \
                 most {count} ranks on this machine (--nproc {count}), or see that CUDA_VISIBLE_DEVICES names enough",
                count - 1
            ),
        });
    };
    if card.capability < OLDEST {
        return Err(format!(
            "GPU {ordinal} ({}) has compute capability {}, and the kernels need {} (Turing: RTX 20, T4) or newer",
            card.name,
            capability(card.capability),
            capability(OLDEST)
        ));
    }
    if built.code_for(card.capability).is_none_or(|code| code < NEWER && card.capability >= NEWER) {
        let code: Vec<String> = built.code.iter().map(|&code| capability(code)).collect();
        return Err(format!(
            "GPU {ordinal} ({}) has compute capability {}, and this program was built with kernels for {}: build it with \
             DBLAUNCH_CUDA_ARCHS=\"{}\", or without that variable for all GPUs",
            card.name,
            capability(card.capability),
            code.join(", "),
            card.capability
        ));
    }
    Ok((ordinal, card))
}

fn no_gpu() -> String {
    "the NVIDIA driver shows no GPU: see that `nvidia-smi` lists one and that CUDA_VISIBLE_DEVICES, if it is set, names one \
     that is there"
        .to_string()
}

/// Why `cuInit` failed.
fn refusal(code: u32) -> String {
    match code {
        100 => no_gpu(),
        802 => {
            "the NVIDIA driver waits for the fabric between the GPUs: see that the service nvidia-fabricmanager runs, in the \
             driver's version"
                .to_string()
        }
        35 | 804 => "the NVIDIA driver is too old for this machine's CUDA libraries: install a newer one".to_string(),
        803 => {
            "the NVIDIA driver's library and its kernel module are of different versions, as after an update: restart \
                the machine"
                .to_string()
        }
        _ => format!(
            "the NVIDIA driver does not start (CUDA error {code}): see whether `nvidia-smi` works; if it does not, restart \
             the machine or install the driver anew"
        ),
    }
}

/// `13.0`.
pub fn version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// `8.6`.
pub fn capability(number: u32) -> String {
    format!("{}.{}", number / 10, number % 10)
}

/// The first series of drivers for Linux that comes with a CUDA: NVIDIA's release notes of the toolkit, table 3.
fn series(toolkit: u32) -> u32 {
    match toolkit {
        13010.. => 590,
        13000.. => 580,
        12090.. => 575,
        12080.. => 570,
        12060.. => 560,
        12050.. => 555,
        12040.. => 550,
        12030.. => 545,
        12020.. => 535,
        12010.. => 530,
        _ => 525,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(capability: u32) -> Card {
        Card { name: "Test".into(), capability, multiprocessors: 28, uuid: [1; 16], memory: 8 << 30 }
    }

    fn built(code: &[u32]) -> Built {
        Built { toolkit: 13000, code: code.to_vec() }
    }

    fn problem(found: &Found, local_rank: usize) -> String {
        choose(found, local_rank, &built(&[75, 80, 86, 89, 90])).unwrap_err()
    }

    #[test]
    fn each_way_in_which_a_gpu_cannot_be_used_has_its_words() {
        let good = Found { driver: 13000, refuses: None, cards: vec![card(75), card(90)] };
        assert_eq!(choose(&good, 1, &built(&[75, 80])).unwrap().0, 1);
        assert!(problem(&good, 2).contains("there are 2 GPUs (0 to 1)"));
        let old = Found { driver: 12080, ..good.clone() };
        assert!(problem(&old, 0).contains("it knows CUDA 12.8 and this program was built with 13.0"));
        assert!(problem(&old, 0).contains("580"));
        let none = Found { cards: Vec::new(), ..good.clone() };
        assert!(problem(&none, 0).contains("shows no GPU"));
        let pascal = Found { cards: vec![card(61)], ..good.clone() };
        assert!(problem(&pascal, 0).contains("compute capability 6.1"));
        for (code, word) in [(100, "shows no GPU"), (803, "restart the machine"), (999, "CUDA error 999")] {
            assert!(problem(&Found { refuses: Some(code), ..good.clone() }, 0).contains(word), "{code}");
        }
    }

    #[test]
    fn a_rank_that_sees_one_gpu_uses_it() {
        let one = Found { driver: 13000, refuses: None, cards: vec![card(80)] };
        assert_eq!(choose(&one, 3, &built(&[80])).unwrap().0, 0);
    }

    #[test]
    fn a_program_whose_kernels_are_for_other_gpus_says_which_to_build() {
        let one = |capability| Found { driver: 13000, refuses: None, cards: vec![card(capability)] };
        let fits = |capability, code: &[u32]| choose(&one(capability), 0, &built(code)).map(drop);
        for capability in [75, 80, 86, 87, 89, 90, 100, 120] {
            fits(capability, &[75, 80, 86, 89, 90]).unwrap();
        }
        // Code of one generation runs on the later ones of the same major number; the last entry's on all later ones.
        fits(86, &[80]).unwrap();
        fits(90, &[75, 80]).unwrap();
        // Code for Turing would be launched as if it were for what is newer.
        for (capability, code) in [(80, &[75][..]), (90, &[75]), (75, &[80]), (80, &[86]), (89, &[75, 90])] {
            let told = fits(capability, code).unwrap_err();
            assert!(told.contains(&format!("DBLAUNCH_CUDA_ARCHS=\"{capability}\"")), "{told}");
        }
    }
}
