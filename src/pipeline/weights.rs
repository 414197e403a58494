//! A pipeline's weights as one source: canonical names begin with their component.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};

use crate::model::{Component, ComponentWeights};
use crate::zero::WeightSource;

/// The components whose weights are read, opened.
pub struct PipelineWeights(Vec<ComponentWeights>);

impl PipelineWeights {
    pub fn open(model_dir: &Path, variant: &str) -> Result<Self> {
        let components = [Component::Unet, Component::TextEncoder, Component::Vae];
        let open = |component: Component| ComponentWeights::open(&model_dir.join(component.name()), variant, component);
        Ok(PipelineWeights(components.into_iter().map(open).collect::<Result<_>>()?))
    }

    /// Every component is opened, so this finds it.
    pub fn component(&self, component: Component) -> &ComponentWeights {
        self.0.iter().find(|w| w.component() == component).expect("all components are opened")
    }
}

impl WeightSource for PipelineWeights {
    fn read(&self, name: &str, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        let component = Component::of(name).with_context(|| format!("{name} belongs to no component"))?;
        self.component(component).read(name, range, into)
    }
}
