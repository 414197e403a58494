//! The prompts of a command line, and the pictures that come of them.

use std::path::Path;

use anyhow::Result;

use super::counted;
use crate::cli::SampleArgs;
use crate::data::{ClipTokenizer, Tokens};
use crate::sample::Picture;
use crate::{Refusal, input_file};

/// Unique texts, and the pictures that are made of them in the order in which they are written.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// Each once.
    pub texts: Vec<String>,
    pub pictures: Vec<Picture>,
    /// Prompts, before each is taken `--num` times.
    pub rows: usize,
}

impl Prompts {
    /// Errors are [`Refusal`]s.
    pub fn read(args: &SampleArgs) -> Result<Prompts> {
        let mut prompts = args.prompts.clone();
        if let Some(file) = &args.prompt_file {
            prompts.extend(lines(file)?);
        }
        let negatives = match args.negative_prompts.len() {
            0 => vec![String::new(); prompts.len()],
            1 => vec![args.negative_prompts[0].clone(); prompts.len()],
            n if n == prompts.len() => args.negative_prompts.clone(),
            n => {
                return Err(Refusal::error(format!(
                    "{n} negative prompts for {}: give one for all of them, or one each",
                    counted(prompts.len(), "prompt")
                )));
            }
        };
        let total = prompts.len().saturating_mul(args.num.get());
        if total > MOST_PICTURES {
            return Err(Refusal::error(format!(
                "{} of {} each are {total}, and their names have five digits: ask for at most {MOST_PICTURES} at a time",
                counted(prompts.len(), "prompt"),
                counted(args.num.get(), "picture")
            )));
        }
        let mut made = Prompts { texts: Vec::new(), pictures: Vec::new(), rows: prompts.len() };
        for (prompt, negative) in prompts.iter().zip(&negatives) {
            let (prompt, negative) = (made.number(prompt), made.number(negative));
            for _ in 0..args.num.get() {
                let number = made.pictures.len() as u64;
                made.pictures.push(Picture { number, prompt, negative });
            }
        }
        Ok(made)
    }

    /// The text's number; a new one if it was not there.
    fn number(&mut self, text: &str) -> usize {
        self.texts.iter().position(|known| known == text).unwrap_or_else(|| {
            self.texts.push(text.to_string());
            self.texts.len() - 1
        })
    }

    /// Each text in tokens, and what was cut off those that are too long. A [`Refusal`] instead unless `cut`.
    pub fn tokens(&self, tokenizer: &ClipTokenizer, cut: bool) -> Result<(Vec<Tokens>, Vec<String>)> {
        let tokens = self.texts.iter().map(|text| tokenizer.encode(text)).collect::<Result<Vec<_>>>()?;
        let too_long = |(text, tokens): (&String, &Tokens)| {
            let rest = tokens.truncated.as_ref()?;
            let kept = text.strip_suffix(rest.as_str()).unwrap_or(text).trim_end();
            Some((beginning(kept), rest.clone()))
        };
        let long: Vec<(String, String)> = self.texts.iter().zip(&tokens).filter_map(too_long).collect();
        let most = tokenizer.max_length() - 2;
        let say = |(kept, rest): &(String, String)| {
            format!(
                "the prompt \"{kept} …\" is longer than the {most} tokens that this model reads; cut off: \"{rest}\""
            )
        };
        let problems: Vec<String> = long.iter().map(say).collect();
        if cut || problems.is_empty() {
            return Ok((tokens, problems));
        }
        let remedy = |what: String| format!("{what}: shorten it, or let it be cut (--cut-prompts)");
        Err(Refusal { problems: problems.into_iter().map(remedy).collect() }.into())
    }
}

/// Enough of a text to know it by.
fn beginning(text: &str) -> String {
    const SHOWN: usize = 40;
    text.chars().take(SHOWN).collect()
}

const MOST_PICTURES: usize = 100_000;

/// The prompts of a file: its lines that are not blank.
fn lines(file: &Path) -> Result<Vec<String>> {
    let refused = |what: String| Refusal::error(format!("--prompt-file {}: {what}", file.display()));
    let text = input_file::text(file)
        .map_err(|error| refused(format!("it cannot be read as text ({error}): name a file with one prompt a line")))?;
    let lines: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string).collect();
    if lines.is_empty() { Err(refused("there is no prompt in it: write one a line".to_string())) } else { Ok(lines) }
}
