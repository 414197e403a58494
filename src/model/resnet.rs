//! The ResNet layer of UNet and VAE (diffusers' `ResnetBlock2D` with its default time shift).

use candle_core::{Result, Tensor};

use super::layers::{Conv, GroupNorm, Linear};
use crate::ops;
use crate::segment::Params;

/// What all ResNet layers of a network have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResnetShape {
    pub groups: usize,
    pub eps: f64,
    /// Width of the time embedding; None in the VAE.
    pub time_width: Option<usize>,
    /// The sum of branch and skip is divided by this.
    pub output_scale: f64,
}

/// x + branch(x), where branch = conv2(silu(norm2(conv1(silu(norm1 x)) + time))).
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv,
    shortcut: Option<Conv>,
    output_scale: f64,
}

impl Resnet {
    pub fn new(p: &Params, inputs: usize, outputs: usize, shape: ResnetShape) -> Self {
        let ResnetShape { groups, eps, time_width, output_scale } = shape;
        Resnet {
            norm1: GroupNorm::new(&p.pp("norm1"), inputs, groups, eps),
            conv1: Conv::same(&p.pp("conv1"), inputs, outputs, 3),
            time: time_width.map(|width| Linear::new(&p.pp("time_emb_proj"), width, outputs)),
            norm2: GroupNorm::new(&p.pp("norm2"), outputs, groups, eps),
            conv2: Conv::same(&p.pp("conv2"), outputs, outputs, 3),
            shortcut: (inputs != outputs).then(|| Conv::same(&p.pp("conv_shortcut"), inputs, outputs, 1)),
            output_scale,
        }
    }

    /// x (B, inputs, H, W), time: SiLU of the time embedding, (B, time_width) -> (B, outputs, H, W)
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.silu(x)?)?;
        if let (Some(project), Some(time)) = (&self.time, time) {
            h = ops::add_channels(&h, &project.forward(time)?)?;
        }
        let h = self.conv2.forward(&self.norm2.silu(&h)?)?;
        let sum = match &self.shortcut {
            Some(shortcut) => ops::add(&shortcut.forward(x)?, &h)?,
            None => ops::add(x, &h)?,
        };
        if self.output_scale == 1.0 { Ok(sum) } else { ops::scale(&sum, 1.0 / self.output_scale) }
    }
}
