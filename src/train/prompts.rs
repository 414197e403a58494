//! The run's prompts, and which of them each row of a micro-batch is trained with: its picture's caption or the
//! instance prompt, the class prompt, or none.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use candle_core::DType;

use super::validation::Validation;
use crate::config::RunPlan;
use crate::data::{ClipTokenizer, Tokens};
use crate::device::Compute;
use crate::diffusion::Row;
use crate::model::{self, Component};
use crate::pipeline::{Configs, Frozen, PipelineWeights, Prompts};
use crate::zero::Tiers;

/// All that a run says to the text encoder.
pub struct Texts {
    pub prompts: Prompts,
    pub numbers: PromptNumbers,
    /// As the network takes them, too: tokens if its text encoder trains.
    pub of_validation: Option<Prompts>,
}

impl Texts {
    /// Tokenises, and encodes what a frozen text encoder can encode now; it is dropped if nothing is left to do.
    pub fn read(
        plan: &RunPlan,
        captions: &[String],
        model_dir: &Path,
        configs: &Configs,
        weights: &PipelineWeights,
        tiers: &Tiers,
        compute: &Compute,
    ) -> Result<Self> {
        let (texts, numbers) = PromptNumbers::list(plan, captions);
        let folder = model_dir.join("tokenizer");
        let tokens = tokens(&folder, plan.data.tokenizer_max_length, &texts)?;
        // As a pipeline takes them, whatever length and mask the training has.
        let shown = match &plan.validation {
            Some(validation) => Some(tokens_of(&folder, &Validation::texts(validation))?),
            None => None,
        };
        if plan.model.train_text_encoder {
            return Ok(Texts { prompts: Prompts::Tokens(tokens), numbers, of_validation: shown.map(Prompts::Tokens) });
        }
        // In fp32: a frozen encoder gives the same states every time, and they are computed once.
        let encoder = model::text_encoder(&configs.text, plan.data.text_encoder_use_attention_mask, DType::F32);
        weights.component(Component::TextEncoder).check(&model::wanted(&encoder.graph, Component::TextEncoder))?;
        let frozen = Frozen::load(encoder.graph, DType::F32, tiers, weights)?;
        let of_validation = match shown {
            Some(tokens) => Some(Prompts::encode(&frozen, &encoder.slots, &tokens, compute)?),
            None => None,
        };
        let prompts = Prompts::frozen(frozen, encoder.slots, configs.text.hidden_size, tokens, compute)?;
        Ok(Texts { prompts, numbers, of_validation })
    }
}

fn tokens(folder: &Path, max_length: Option<usize>, texts: &[String]) -> Result<Vec<Tokens>> {
    let tokenizer = ClipTokenizer::open(folder, max_length)?;
    texts.iter().map(|text| tokenizer.encode(text)).collect()
}

/// With the tokenizer's own length, and nothing masked.
fn tokens_of(folder: &Path, texts: &[String]) -> Result<Vec<Tokens>> {
    let mut tokens = tokens(folder, None, texts)?;
    tokens.iter_mut().for_each(|tokens| tokens.length = tokens.ids.len());
    Ok(tokens)
}

/// Which of the run's prompts a row is trained with.
#[derive(Clone, Debug, Default)]
pub struct PromptNumbers {
    /// Of each instance image, file by file; one for all where they have no captions.
    instances: Vec<usize>,
    class: usize,
    /// The empty prompt and how often it replaces the row's own.
    dropped: Option<(usize, f64)>,
}

impl PromptNumbers {
    /// The run's prompts, each once (the class prompt always by itself), and who has which. `captions`: of each instance
    /// image, or none.
    pub fn list(plan: &RunPlan, captions: &[String]) -> (Vec<String>, PromptNumbers) {
        let own = match captions {
            [] => std::slice::from_ref(&plan.data.instance_prompt),
            captions => captions,
        };
        let mut prompts: Vec<String> = Vec::new();
        let mut known: HashMap<&str, usize> = HashMap::new();
        let mut instances = Vec::with_capacity(own.len());
        for text in own {
            instances.push(*known.entry(text).or_insert_with(|| {
                prompts.push(text.clone());
                prompts.len() - 1
            }));
        }
        let mut add = |text: &str| {
            prompts.push(text.to_string());
            prompts.len() - 1
        };
        let class = plan.prior.as_ref().map_or(0, |prior| add(&prior.class_prompt));
        let rate = plan.data.caption_dropout;
        let dropped = (rate > 0.0).then(|| (add(""), rate));
        (prompts, PromptNumbers { instances, class, dropped })
    }

    /// The number of the prompt of a row of this kind whose image is file number `file`; `drops` draws whether
    /// something happens that does at a rate.
    pub fn of(&self, kind: Row, file: u64, drops: impl FnOnce(f64) -> bool) -> usize {
        match (self.dropped, kind) {
            (Some((empty, rate)), _) if drops(rate) => empty,
            (_, Row::Instance) => self.instances[file as usize % self.instances.len().max(1)],
            (_, Row::Class) => self.class,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_its_prompt() {
        let numbers = PromptNumbers { instances: vec![0, 1, 0], class: 2, dropped: Some((3, 0.25)) };
        let of = |kind, file, dropped| numbers.of(kind, file, |rate| dropped && rate == 0.25);
        assert_eq!([0, 1, 2, 3].map(|file| of(Row::Instance, file, false)), [0, 1, 0, 0]);
        assert_eq!((of(Row::Class, 5, false), of(Row::Instance, 1, true)), (2, 3));
    }
}
