#!/usr/bin/env python3
"""Records trajectories of diffusers' schedulers for src/diffusion/sampler/tests.rs (needs torch, diffusers, scipy).

usage: make.py

Writes beside itself cases.json (kind, configuration, number of steps, eta; time steps, start's factor and number of
noises that diffusers gave) and trajectories.safetensors: `start` (P, C, h, w) and `noise` (K, P, C, h, w) for all cases,
and for every case `NAME` (calls, P, C, h, w): the sample after every call. The network is a closed form of sample and
time that the test repeats, in f64 and rounded to f32. Also guidance: two predictions and what became of them."""
import importlib, json, os
import numpy as np, torch
import diffusers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPE = (2, 3, 3, 4)
NOISES = 32

CLASSES = {
    "ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler", "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2m-sde": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler",
}
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
SD15 = dict(_class_name="PNDMScheduler", _diffusers_version="0.6.0", **SD, set_alpha_to_one=False, skip_prk_steps=True,
    steps_offset=1, trained_betas=None, clip_sample=False)
SD21 = dict(SD15, _class_name="DDIMScheduler", prediction_type="v_prediction")
ZSNR = dict(SD21, rescale_betas_zero_snr=True, timestep_spacing="trailing")
SDXL = dict(_class_name="EulerDiscreteScheduler", **SD, prediction_type="epsilon", interpolation_type="linear",
    clip_sample=False, sample_max_value=1.0, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    timestep_spacing="leading", trained_betas=None, use_karras_sigmas=False)
IF = dict(_class_name="DDPMScheduler", num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02,
    beta_schedule="squaredcos_cap_v2", variance_type="learned_range", prediction_type="epsilon", clip_sample=True,
    clip_sample_range=1.0, thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5, trained_betas=None)

CASES = []

def case(name, kind, config, steps, eta=0.0, **more):
    CASES.append(dict(name=f"{kind}/{name}", kind=kind, config={**config, **more}, steps=steps, eta=eta))

for kind in CLASSES:
    case("sd15", kind, SD15, 7)
    case("sd21", kind, SD21, 9)
    case("zero-snr", kind, ZSNR, 6)
    case("sdxl", kind, SDXL, 8)
    case("if", kind, IF, 10)

case("fixed-large", "ddpm", SD15, 5, variance_type="fixed_large")
case("fixed-small-log", "ddpm", SD15, 5, variance_type="fixed_small_log", timestep_spacing="linspace")
case("learned", "ddpm", IF, 6, variance_type="learned", thresholding=False, clip_sample_range=0.8)
case("sample", "ddpm", SDXL, 7, prediction_type="sample", clip_sample=True)
case("if-27-trailing", "ddpm", IF, 27, timestep_spacing="trailing", sample_max_value=1.0)
case("defaults", "ddpm", {}, 5)
case("trained-betas", "ddpm", dict(trained_betas=[0.01 * i for i in range(1, 21)], num_train_timesteps=20), 20)
case("eta", "ddim", SD15, 7, eta=0.5)
case("eta-velocity", "ddim", ZSNR, 5, eta=1.0)
case("thresholding", "ddim", SD15, 6, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.5)
case("sample", "ddim", SD21, 6, prediction_type="sample", clip_sample=True, clip_sample_range=0.7)
case("odd-linspace", "ddim", SDXL, 13, timestep_spacing="linspace", set_alpha_to_one=True)
case("defaults", "ddim", {}, 3)
case("trained-betas", "ddim", dict(trained_betas=[0.01 * i for i in range(1, 21)], num_train_timesteps=20), 7)
case("runge-kutta", "pndm", SD15, 6, skip_prk_steps=False)
case("runge-kutta-velocity", "pndm", SD21, 4, skip_prk_steps=False, timestep_spacing="trailing")
case("one", "pndm", SD15, 1)
case("two", "pndm", SD15, 2)
case("trailing", "pndm", SD15, 7, timestep_spacing="trailing", set_alpha_to_one=True)
case("linspace", "pndm", SDXL, 11, timestep_spacing="linspace")
case("one", "euler", SDXL, 1)
case("karras", "euler", SDXL, 9, use_karras_sigmas=True)
case("karras-bounds", "euler", SD21, 7, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0)
case("exponential", "euler", SDXL, 9, use_exponential_sigmas=True)
case("beta", "euler", SDXL, 9, use_beta_sigmas=True)
case("log-linear", "euler", SDXL, 9, interpolation_type="log_linear")
case("continuous", "euler", SD21, 7, timestep_type="continuous", use_karras_sigmas=True)
case("sigma-min", "euler", SD15, 7, final_sigmas_type="sigma_min", timestep_spacing="trailing")
case("sample", "euler", SD15, 7, prediction_type="sample")
case("linspace", "euler-a", SD15, 13, timestep_spacing="linspace")
case("zero-snr-linspace", "euler-a", ZSNR, 7, timestep_spacing="linspace")
case("one", "dpm++2m", SD15, 1)
case("first", "dpm++2m", SDXL, 7, solver_order=1)
case("third", "dpm++2m", SDXL, 17, solver_order=3)
case("third-short", "dpm++2m", SD21, 9, solver_order=3, timestep_spacing="trailing")
case("heun", "dpm++2m", SDXL, 9, solver_type="heun")
case("karras", "dpm++2m", SDXL, 9, use_karras_sigmas=True)
case("karras-cosine", "dpm++2m", IF, 9, use_karras_sigmas=True, solver_type="logrho")
case("lu", "dpm++2m", SDXL, 9, use_lu_lambdas=True)
case("exponential", "dpm++2m", SDXL, 9, use_exponential_sigmas=True)
case("beta", "dpm++2m", SDXL, 9, use_beta_sigmas=True)
case("euler-at-final", "dpm++2m", SD15, 16, euler_at_final=True, final_sigmas_type="sigma_min")
case("no-lower-order", "dpm++2m", SD15, 8, lower_order_final=False, final_sigmas_type="sigma_min")
case("clipped", "dpm++2m", IF, 9, lambda_min_clipped=-4.0)
case("clipped-trailing", "dpm++2m", IF, 9, lambda_min_clipped=-2.0, timestep_spacing="trailing")
case("sample", "dpm++2m", SD15, 7, prediction_type="sample", thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=1.5)
for order in (1, 2, 3):
    case(f"noise-{order}", "dpm++2m", SD15, 16, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=order)
case("noise-heun-velocity", "dpm++2m", SD21, 9, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_type="heun", thresholding=True)
case("noise-sample", "dpm++2m", SD21, 9, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", prediction_type="sample")
case("third", "dpm++2m-sde", SDXL, 17, solver_order=3)
case("heun", "dpm++2m-sde", SD21, 9, solver_type="heun", use_karras_sigmas=True)
case("noise", "dpm++2m-sde", SD15, 8, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min")
case("noise-heun", "dpm++2m-sde", SD21, 8, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min", solver_type="heun")
case("one", "unipc", SD15, 1)
# under bh1 diffusers multiplies zero by infinity in the step to sigma = 0
case("bh1", "unipc", SDXL, 9, solver_type="bh1", final_sigmas_type="sigma_min")
case("first", "unipc", SD15, 7, solver_order=1)
case("third", "unipc", SD15, 11, solver_order=3)
case("third-bh1-trailing", "unipc", SD21, 12, solver_order=3, solver_type="bh1", timestep_spacing="trailing", final_sigmas_type="sigma_min")
case("noise", "unipc", SD15, 8, predict_x0=False, final_sigmas_type="sigma_min")
case("noise-third-velocity", "unipc", SD21, 10, predict_x0=False, final_sigmas_type="sigma_min", solver_order=3, solver_type="midpoint")
case("noise-sample", "unipc", SD15, 8, predict_x0=False, final_sigmas_type="sigma_min", prediction_type="sample")
case("no-corrector", "unipc", SD15, 8, disable_corrector=[0, 1, 4])
case("karras", "unipc", SDXL, 9, use_karras_sigmas=True)
case("exponential", "unipc", SDXL, 9, use_exponential_sigmas=True)
case("beta-sigma-min", "unipc", SDXL, 9, use_beta_sigmas=True, final_sigmas_type="sigma_min")
case("karras-bounds", "unipc", SD21, 9, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0)
case("no-lower-order", "unipc", SD15, 8, lower_order_final=False, final_sigmas_type="sigma_min")
case("thresholding", "unipc", SD15, 8, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)

def network(x, t, config):
    """Smooth in sample, time and channel; a second half of variances where the configuration says so."""
    x = x.double()
    c = torch.arange(SHAPE[1], dtype=torch.float64).reshape(1, -1, 1, 1)
    mean = 0.7 * x + 0.5 * torch.sin(1.3 * x + 0.002 * t + 0.4 * c)
    wave = torch.sin(0.9 * x + 0.003 * t - 0.3 * c)
    variance = {"learned_range": wave, "learned": 0.02 + 0.01 * wave}.get(config.get("variance_type"))
    return mean.float() if variance is None else torch.cat([mean, variance], 1).float()

def record(case, start, noises):
    kind, name = case["kind"], CLASSES[case["kind"]]
    config, changes = dict(case["config"]), {}
    if kind == "dpm++2m-sde":
        changes["algorithm_type"] = config.get("algorithm_type", "sde-dpmsolver++")
    cls = getattr(diffusers, name)
    module = importlib.import_module(cls.__module__)
    drawn = []
    def next_noise(shape, **_):
        assert tuple(shape) == SHAPE
        drawn.append(len(drawn))
        return noises[drawn[-1]].clone()
    if hasattr(module, "randn_tensor"):
        module.randn_tensor = next_noise
    scheduler = cls.from_config(config, **changes)
    scheduler.set_timesteps(case["steps"])
    # else the place of the first time step is looked up, and found one too late where rounding made two of them equal
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    sample, out = start * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(sample, t)
        prediction = network(shown, float(t), config)
        # what the IF pipelines do for schedulers without a learned variance
        if prediction.shape[1] != SHAPE[1] and kind not in ("ddpm", "dpm++2m", "dpm++2m-sde"):
            prediction = prediction[:, : SHAPE[1]]
        more = {"eta": case["eta"]} if kind == "ddim" else {}
        sample = scheduler.step(prediction, t, sample, **more).prev_sample
        assert sample.dtype == torch.float32 and torch.isfinite(sample).all(), case["name"]
        out.append(sample)
    case["timesteps"] = [float(t) for t in scheduler.timesteps]
    case["initial_scale"] = float(scheduler.init_noise_sigma)
    case["noises"] = len(drawn)
    return torch.stack(out)

def main():
    generator = torch.Generator().manual_seed(20)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    start, noises = draw(*SHAPE), draw(NOISES, *SHAPE)
    tensors = {"start": start, "noise": noises}
    for c in CASES:
        assert c["name"] not in tensors, c["name"]
        tensors[c["name"]] = record(c, start, noises)
    uncond, cond = draw(*SHAPE), draw(*SHAPE) * 1.5
    guided = uncond + 7.5 * (cond - uncond)
    tensors |= {"guidance/uncond": uncond, "guidance/cond": cond, "guidance/guided": guided,
        "guidance/rescaled": rescale_noise_cfg(guided, cond, guidance_rescale=0.7)}
    save_file({k: np.ascontiguousarray(v.numpy()) for k, v in tensors.items()}, f"{HERE}/trajectories.safetensors")
    with open(f"{HERE}/cases.json", "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c) for c in CASES) + "\n]\n")
    print(len(CASES), "cases of diffusers", diffusers.__version__)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
