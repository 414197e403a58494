//! Forward, backward and update of one level of SD 1.5's UNet (two ResNet + transformer layers of 320 channels),
//! without recompute: what `benches/layers_torch.py` times beside the same in PyTorch.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use candle_core::DType;
use serde_json::json;

use super::{check_rows, shape};
use crate::comm::Solo;
use crate::diffusion::Draws;
use crate::model::Denoiser;
use crate::segment::Keep;
use crate::train::network::{Build, Network};
use crate::train::step::{Inputs, Then};
use crate::zero::{Ranks, Stage};

/// Times `repeats` steps after one that is not counted, batch `batch`, `latent` x `latent` latents; prints one JSON line
/// with the seconds of each.
pub fn layers(batch: usize, latent: usize, repeats: usize, dtype: DType) -> Result<()> {
    check_rows(batch, latent)?;
    let (config, Denoiser { mut graph, .. }) = shape::sd15();
    let first = graph.nodes.iter().position(|n| n.name.starts_with("unet.down_blocks.0.layer")).unwrap_or(0);
    graph.nodes.drain(..first);
    let count = graph.nodes.iter().take_while(|n| n.name.starts_with("unet.down_blocks.0.layer")).count();
    graph.nodes.truncate(count);
    let [x, temb, context] = [graph.nodes[0].inputs[0], graph.nodes[0].inputs[1], graph.nodes[0].inputs[2]];
    let prediction = graph.nodes[count - 1].outputs[0];
    let ranks = Ranks { comm: Arc::new(Solo), stage: Stage::Replicated, reduce_dtype: DType::F32 };
    let mut network = {
        let build = Build::on_device(&ranks, dtype, Keep::Graph, &graph)?;
        Network::load(graph, build, &shape::Made)?
    };
    let channels = config.levels[0].channels;
    let draws = Draws::new(1);
    let slots = vec![
        (x, shape::noise(&draws, 0, &[batch, channels, latent, latent])?.to_dtype(dtype)?),
        (temb, shape::noise(&draws, 1, &[batch, 4 * channels])?.to_dtype(dtype)?),
        (context, shape::noise(&draws, 2, &[batch, 77, config.cross_attention_dim])?.to_dtype(dtype)?),
    ];
    let mut times = Vec::new();
    for step in 0..=repeats {
        let started = Instant::now();
        let mut forward = 0.0;
        let inputs = Inputs { slots: slots.clone(), prediction };
        network.forward_backward(Some(inputs), Then::Norm, |y| {
            forward = started.elapsed().as_secs_f64();
            Ok((y * (2.0 / y.elem_count() as f64))?)
        })?;
        let backward = started.elapsed().as_secs_f64() - forward;
        network.reduce()?;
        network.update(step as u64 + 1, 1.0, |_| shape::group())?;
        let total = started.elapsed().as_secs_f64();
        if step > 0 {
            times.push(
                json!({"forward": forward, "backward": backward, "update": total - forward - backward, "total": total}),
            );
        }
    }
    println!("{}", json!({ "batch": batch, "latent": latent, "dtype": format!("{dtype:?}"), "steps": times }));
    Ok(())
}
