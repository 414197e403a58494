//! The names of the samplers: the program's and diffusers'.

use crate::Refusal;
use std::fmt;
use std::str::FromStr;

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// Ancestral sampling of Ho et al. 2020, <https://arxiv.org/abs/2006.11239>.
    Ddpm,
    /// Song et al. 2020, <https://arxiv.org/abs/2010.02502>.
    Ddim,
    /// Pseudo numerical methods, Liu et al. 2022, <https://arxiv.org/abs/2202.09778>.
    Pndm,
    /// Euler's method in the formulation of Karras et al. 2022, <https://arxiv.org/abs/2206.00364>.
    Euler,
    /// Euler's method with ancestral noise.
    EulerAncestral,
    /// DPM-Solver++ of Lu et al. 2022, <https://arxiv.org/abs/2211.01095>: multistep, second order unless configured.
    Dpmpp2m,
    /// The same for the stochastic differential equation.
    Dpmpp2mSde,
    /// Zhao et al. 2023, <https://arxiv.org/abs/2302.04867>.
    UniPc,
}

impl SamplerKind {
    pub const ALL: [SamplerKind; 8] = [
        SamplerKind::Ddpm,
        SamplerKind::Ddim,
        SamplerKind::Pndm,
        SamplerKind::Euler,
        SamplerKind::EulerAncestral,
        SamplerKind::Dpmpp2m,
        SamplerKind::Dpmpp2mSde,
        SamplerKind::UniPc,
    ];

    /// The name on the command line and in configurations.
    pub fn name(self) -> &'static str {
        match self {
            SamplerKind::Ddpm => "ddpm",
            SamplerKind::Ddim => "ddim",
            SamplerKind::Pndm => "pndm",
            SamplerKind::Euler => "euler",
            SamplerKind::EulerAncestral => "euler-a",
            SamplerKind::Dpmpp2m => "dpm++2m",
            SamplerKind::Dpmpp2mSde => "dpm++2m-sde",
            SamplerKind::UniPc => "unipc",
        }
    }

    /// diffusers' class.
    pub fn class_name(self) -> &'static str {
        match self {
            SamplerKind::Ddpm => "DDPMScheduler",
            SamplerKind::Ddim => "DDIMScheduler",
            SamplerKind::Pndm => "PNDMScheduler",
            SamplerKind::Euler => "EulerDiscreteScheduler",
            SamplerKind::EulerAncestral => "EulerAncestralDiscreteScheduler",
            SamplerKind::Dpmpp2m | SamplerKind::Dpmpp2mSde => "DPMSolverMultistepScheduler",
            SamplerKind::UniPc => "UniPCMultistepScheduler",
        }
    }

    /// All names, for messages.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for SamplerKind {
    type Err = anyhow::Error;

    /// # Errors
    /// A [`Refusal`] that lists the names and says which is nearest.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if let Some(kind) = Self::ALL.into_iter().find(|kind| kind.name() == name) {
            return Ok(kind);
        }
        let lower = name.to_lowercase();
        let likeness = |known: &str| strsim::normalized_damerau_levenshtein(&lower, &known.to_lowercase());
        let nearest = Self::ALL
            .into_iter()
            .map(|kind| (likeness(kind.name()).max(likeness(kind.class_name())), kind))
            .filter(|(likeness, _)| *likeness >= 0.4)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = nearest.map(|(_, kind)| format!(" Did you mean \"{kind}\"?")).unwrap_or_default();
        Err(Refusal::error(format!("there is no sampler \"{name}\".{hint} The samplers are {}.", Self::names())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        for kind in SamplerKind::ALL {
            assert_eq!(kind.to_string().parse::<SamplerKind>().unwrap(), kind);
        }
    }

    #[test]
    fn an_unknown_name_is_told_the_names_and_the_nearest() {
        for (wrong, nearest) in [
            ("dpm++-2m", "dpm++2m"),
            ("Euler_a", "euler-a"),
            ("uni-pc", "unipc"),
            ("PNDMScheduler", "pndm"),
            ("plms", ""),
            ("EulerAncestralDiscrete", "euler-a"),
        ] {
            let error = wrong.parse::<SamplerKind>().unwrap_err();
            assert!(error.is::<Refusal>());
            let text = error.to_string();
            assert!(text.contains("dpm++2m-sde") && text.contains("unipc"), "{text}");
            match nearest {
                "" => assert!(!text.contains("Did you mean"), "{text}"),
                nearest => assert!(text.contains(&format!("Did you mean \"{nearest}\"?")), "{text}"),
            }
        }
    }
}
