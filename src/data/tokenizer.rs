//! CLIP's tokenizer as transformers' `CLIPTokenizer` builds it from a model's folder: byte-level BPE over lower-cased
//! text with an end-of-word suffix, begin and end tokens around it, padded to a fixed length. Only the vocabulary and
//! the special tokens come from files; normalisation and splitting are fixed, also where there is a `tokenizer.json`.

use crate::Refusal;
use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern};
use tokenizers::pre_tokenizers::{
    byte_level::ByteLevel, sequence::Sequence as PreTokenizers, split::Split, split::SplitPattern,
};
use tokenizers::tokenizer::{SplitDelimiterBehavior, Tokenizer};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

/// The length CLIP's text encoders were trained with; used where the folder states none.
const CLIP_LENGTH: usize = 77;
/// What `CLIPTokenizer` takes for the words that a prompt is split into.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Named special tokens in the order in which transformers adds those that the vocabulary lacks.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer with its padding.
#[derive(Debug)]
pub struct ClipTokenizer {
    inner: Tokenizer,
    begin: u32,
    end: u32,
    pad: u32,
    max_length: usize,
}

/// A tokenised prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Begin token, the prompt's tokens, end token, then padding to the maximum length.
    pub ids: Vec<u32>,
    /// How many of `ids` are not padding: the ones of the attention mask.
    pub length: usize,
    /// The end of the prompt that did not fit, if any was cut off.
    pub truncated: Option<String>,
}

impl ClipTokenizer {
    /// Opens a pipeline's tokenizer folder: `tokenizer.json`, else `vocab.json` with `merges.txt`; special tokens from
    /// `tokenizer_config.json` and `special_tokens_map.json`, of which the latter wins (unless the former lists its
    /// `added_tokens_decoder`, as in transformers). `max_length` replaces the folder's own maximum.
    ///
    /// # Errors
    /// A [`Refusal`] naming the file and the remedy.
    pub fn open(folder: &Path, max_length: Option<usize>) -> Result<Self> {
        let config = object(&folder.join("tokenizer_config.json"))?;
        let (bpe, file_tokens) = vocabulary(folder)?;
        let mut added = file_tokens;
        let mut special = config.clone();
        if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
            added =
                decoder.iter().filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token, false)?))).collect();
        } else {
            special.extend(object(&folder.join("special_tokens_map.json"))?);
        }
        Self::build(bpe, added, &special, length(&config, max_length)?).map_err(|e| {
            Refusal::error(format!("the tokenizer in {} cannot be used: {e:#}. Restore its files.", folder.display()))
        })
    }

    fn build(
        bpe: BpeBuilder,
        added: BTreeMap<u32, AddedToken>,
        special: &Map<String, Value>,
        max_length: usize,
    ) -> Result<Self> {
        let content =
            |key: &str| named(special, key).map(|t| t.content).with_context(|| format!("{key} is not a token"));
        let bpe = bpe.unk_token(content("unk_token")?).end_of_word_suffix("</w>".into()).build().map_err(foreign)?;
        let mut inner = Tokenizer::new(bpe);
        inner.with_normalizer(Some(normalizer()?)).map_err(foreign)?;
        inner.with_pre_tokenizer(Some(pre_tokenizer()?));
        inner.add_tokens(tokens_to_add(added, special)).map_err(foreign)?;
        let id = |key: &str| {
            let content = content(key)?;
            inner.token_to_id(&content).with_context(|| format!("{key} \"{content}\" is not in the vocabulary"))
        };
        let (begin, end, pad) = (id("bos_token")?, id("eos_token")?, id("pad_token")?);
        Ok(ClipTokenizer { inner, begin, end, pad, max_length })
    }

    /// The number of ids of every encoded prompt.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// One more than the largest id; a text encoder's embedding needs at least as many rows.
    pub fn vocab_size(&self) -> usize {
        let vocab = self.inner.get_vocab(true);
        vocab.values().max().map_or(0, |&id| id as usize + 1)
    }

    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let encoding = self.inner.encode(prompt, false).map_err(foreign).context("tokenising a prompt")?;
        let room = self.max_length - 2;
        let kept = encoding.get_ids().len().min(room);
        let cut = encoding.get_offsets().get(kept).map(|&(start, _)| prompt.get(start..).unwrap_or(prompt));
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.begin);
        ids.extend_from_slice(&encoding.get_ids()[..kept]);
        ids.push(self.end);
        let length = ids.len();
        ids.resize(self.max_length, self.pad);
        Ok(Tokens { ids, length, truncated: cut.map(str::to_owned) })
    }
}

/// A named special token: from the files, else `CLIPTokenizer`'s default.
fn named(special: &Map<String, Value>, key: &str) -> Option<AddedToken> {
    match special.get(key) {
        None | Some(Value::Null) => match key {
            "bos_token" => Some(AddedToken::from("<|startoftext|>", true)),
            "eos_token" | "unk_token" | "pad_token" => Some(AddedToken::from("<|endoftext|>", true)),
            _ => None,
        },
        Some(token) => added_token(token, true),
    }
}

/// The tokens that are matched whole, before a prompt is split into words: those that the files list by id, then the
/// named ones. As in transformers, a token named once as text and once as an object is added twice; the later one's
/// flags hold, so that Stable Diffusion 1's end token matches exact text only.
fn tokens_to_add(listed: BTreeMap<u32, AddedToken>, special: &Map<String, Value>) -> Vec<AddedToken> {
    let listed: Vec<AddedToken> = listed.into_values().collect();
    let mut seen: Vec<(bool, String)> = Vec::new();
    let mut tokens = listed.clone();
    for key in NAMED {
        let Some(token) = named(special, key) else { continue };
        let kind = (special.get(key).is_some_and(Value::is_object), token.content.clone());
        if listed.iter().all(|t| t.content != token.content) && !seen.contains(&kind) {
            seen.push(kind);
            tokens.push(token);
        }
    }
    tokens
}

/// The tokenizers crate's errors as ours.
fn foreign(error: tokenizers::Error) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}

fn normalizer() -> Result<NormalizerWrapper> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(foreign)?;
    Ok(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()]).into())
}

fn pre_tokenizer() -> Result<PreTokenizerWrapper> {
    let words = SplitPattern::Regex(WORDS.into());
    let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(foreign)?;
    Ok(PreTokenizers::new(vec![words.into(), ByteLevel::new(false, true, true).into()]).into())
}

/// The maximum length: what is asked for, else what the folder states. transformers writes 10^30 for "none".
fn length(config: &Map<String, Value>, wanted: Option<usize>) -> Result<usize> {
    const UNLIMITED: f64 = 1e6;
    let stated = config.get("model_max_length").and_then(Value::as_f64).filter(|&l| l < UNLIMITED);
    let length = wanted.unwrap_or(stated.map_or(CLIP_LENGTH, |l| l as usize));
    if length < 3 {
        return Err(Refusal::error(format!(
            "a tokenizer length of {length} leaves no room for a word between the begin and the end token. Set data.tokenizer_max_length to {CLIP_LENGTH}, or leave it out."
        )));
    }
    Ok(length)
}

/// A JSON object's entries; none where there is no file.
fn object(path: &Path) -> Result<Map<String, Value>> {
    match crate::input_file::text(path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|e| Refusal::error(format!("{} is not a JSON object: {e}. Restore the file.", path.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(e) => Err(Refusal::error(format!("{} cannot be read: {e}.", path.display()))),
    }
}

/// A token as the files write it: its text, or an object with text and flags.
fn added_token(token: &Value, special: bool) -> Option<AddedToken> {
    let flag = |key: &str| token.get(key).and_then(Value::as_bool);
    match token {
        Value::String(text) => Some(AddedToken::from(text.as_str(), special)),
        _ => {
            let special = special || flag("special").unwrap_or(false);
            let text = token.get("content")?.as_str()?;
            Some(
                AddedToken::from(text, special)
                    .normalized(flag("normalized").unwrap_or(!special))
                    .single_word(flag("single_word").unwrap_or(false))
                    .lstrip(flag("lstrip").unwrap_or(false))
                    .rstrip(flag("rstrip").unwrap_or(false)),
            )
        }
    }
}

/// The BPE model and, from a `tokenizer.json`, its added tokens by id.
fn vocabulary(folder: &Path) -> Result<(BpeBuilder, BTreeMap<u32, AddedToken>)> {
    let (whole, vocab, merges) = (folder.join("tokenizer.json"), folder.join("vocab.json"), folder.join("merges.txt"));
    if whole.is_file() {
        let parsed = object(&whole)?;
        let read = || -> Option<_> {
            let model = parsed.get("model")?;
            let vocab: Option<Vec<(String, u32)>> = model
                .get("vocab")?
                .as_object()?
                .iter()
                .map(|(token, id)| Some((token.clone(), u32::try_from(id.as_u64()?).ok()?)))
                .collect();
            let merges: Option<Vec<(String, String)>> = model.get("merges")?.as_array()?.iter().map(merge).collect();
            let added = parsed.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
            let added =
                added.filter_map(|t| Some((u32::try_from(t.get("id")?.as_u64()?).ok()?, added_token(t, false)?)));
            Some((BPE::builder().vocab_and_merges(vocab?.into_iter().collect::<Vocab>(), merges?), added.collect()))
        };
        return read().ok_or_else(|| {
            Refusal::error(format!(
                "{} holds no byte-pair vocabulary (model.vocab and model.merges), which a CLIP tokenizer needs. Restore the file.",
                whole.display()
            ))
        });
    }
    for file in [&vocab, &merges] {
        if !file.is_file() {
            return Err(Refusal::error(format!(
                "the tokenizer is incomplete: {} is missing. A tokenizer folder holds tokenizer.json, or vocab.json and merges.txt.",
                file.display()
            )));
        }
    }
    let (vocab, merges) = BPE::read_file(&vocab.to_string_lossy(), &merges.to_string_lossy()).map_err(|e| {
        Refusal::error(format!("vocab.json or merges.txt in {} is damaged: {e}. Restore the files.", folder.display()))
    })?;
    Ok((BPE::builder().vocab_and_merges(vocab, merges), BTreeMap::new()))
}

/// A merge of `tokenizer.json`: "a b", or in newer files ["a", "b"].
fn merge(merge: &Value) -> Option<(String, String)> {
    match merge {
        Value::String(both) => both.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        _ => Some((merge.get(0)?.as_str()?.to_owned(), merge.get(1)?.as_str()?.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::PathBuf;
    use tempfile::TempDir;

    /// A vocabulary of 914 tokens, with what transformers makes of twenty prompts under two padding tokens.
    fn data() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer")
    }

    fn folder(files: &[(&str, Value)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in ["vocab.json", "merges.txt"] {
            std::fs::copy(data().join(file), folder.path().join(file)).unwrap();
        }
        for (name, value) in files {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        folder
    }

    fn check_golden(tokenizer: &ClipTokenizer, padding: &str) {
        let golden = object(&data().join("golden.json")).unwrap();
        for case in golden[padding].as_array().unwrap() {
            let (prompt, ids) = (case[0].as_str().unwrap(), case[1].as_array().unwrap());
            let tokens = tokenizer.encode(prompt).unwrap();
            let expected: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokens.ids[..tokens.length], expected, "{prompt:?}");
            assert_eq!(tokens.ids.len(), 77);
            assert!(tokens.ids[tokens.length..].iter().all(|&id| id == tokenizer.pad));
        }
    }

    #[test]
    fn prompts_become_what_transformers_makes_of_them() {
        let plain = folder(&[("tokenizer_config.json", json!({"model_max_length": 77, "pad_token": "<|endoftext|>"}))]);
        let tokenizer = ClipTokenizer::open(plain.path(), None).unwrap();
        assert_eq!((tokenizer.begin, tokenizer.end, tokenizer.pad, tokenizer.vocab_size()), (912, 913, 913, 914));
        check_golden(&tokenizer, "end");
    }

    #[test]
    fn the_special_tokens_map_wins_and_its_padding_token_is_matched_whole() {
        let config = json!({"pad_token": "<|endoftext|>", "model_max_length": 1e30});
        let end = json!({"content": "<|endoftext|>", "normalized": false});
        for pad in [json!("!"), json!({"content": "!", "normalized": false})] {
            let map = json!({"pad_token": pad, "eos_token": end, "unk_token": end});
            let files = folder(&[("tokenizer_config.json", config.clone()), ("special_tokens_map.json", map)]);
            let tokenizer = ClipTokenizer::open(files.path(), None).unwrap();
            assert_eq!(tokenizer.pad, 0);
            check_golden(&tokenizer, "exclamation");
        }
    }

    #[test]
    fn stable_diffusion_1_s_end_token_matches_exact_text_only() {
        let end = json!({"content": "<|endoftext|>", "normalized": true});
        let map = json!({"eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"});
        let files = folder(&[("special_tokens_map.json", map)]);
        check_golden(&ClipTokenizer::open(files.path(), None).unwrap(), "end");
    }

    #[test]
    fn tokenizer_json_gives_the_same() {
        let vocab = Value::Object(object(&data().join("vocab.json")).unwrap());
        let text = std::fs::read_to_string(data().join("merges.txt")).unwrap();
        for pairs in [false, true] {
            let merges: Vec<Value> = text
                .lines()
                .skip(1)
                .map(|l| if pairs { json!(l.split(' ').collect::<Vec<_>>()) } else { json!(l) })
                .collect();
            let files = tempfile::tempdir().unwrap();
            let end = json!({"id": 913, "content": "<|endoftext|>", "special": true, "normalized": false});
            let whole = json!({"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": [end]});
            std::fs::write(files.path().join("tokenizer.json"), whole.to_string()).unwrap();
            check_golden(&ClipTokenizer::open(files.path(), None).unwrap(), "end");
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_and_said() {
        let files = folder(&[]);
        let tokenizer = ClipTokenizer::open(files.path(), Some(5)).unwrap();
        let tokens = tokenizer.encode("a a a é a").unwrap();
        assert_eq!((tokens.ids.len(), tokens.length, tokens.ids[4]), (5, 5, 913));
        assert_eq!(tokens.truncated.as_deref(), Some("é a"));
        assert_eq!(tokenizer.encode("a a a").unwrap().truncated, None);
    }

    #[test]
    fn damaged_folders_are_refused_by_file() {
        let refused = |files: &TempDir, length| {
            let error = ClipTokenizer::open(files.path(), length).unwrap_err();
            assert!(error.is::<Refusal>(), "{error:#}");
            error.to_string()
        };
        let files = folder(&[]);
        assert!(refused(&files, Some(2)).contains("tokenizer_max_length"));
        std::fs::remove_file(files.path().join("merges.txt")).unwrap();
        assert!(refused(&files, None).contains("merges.txt is missing"));
        assert!(refused(&folder(&[("vocab.json", json!({"a": 0}))]), None).contains("Restore"));
        assert!(refused(&folder(&[("tokenizer_config.json", json!("text"))]), None).contains("tokenizer_config.json"));
        assert!(refused(&folder(&[("tokenizer.json", json!({"model": {}}))]), None).contains("tokenizer.json"));
    }
}
