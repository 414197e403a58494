"""Makes what diffusers makes of the small pipelines, for tests to compare with: pictures from given noise (sample/) and
decoded latents (vae/). Run in this folder with torch, diffusers, transformers, pillow, numpy and safetensors; the
versions of the files that are here: diffusers 0.42.1, torch 2.15.0, transformers 5.23.0, on the CPU in fp32.

Every case is a folder with `case.json` (the options of `dblaunch sample`), `latents.safetensors` (`latents`: the
start, standard normal; `noise.K`: what the K-th stochastic step adds) and the pictures.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"

CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++2m-sde": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}

# sampler None: the model's own. Sizes are height, width; None: the model's own.
CASES = {
    "pndm": dict(model="sd15", sampler=None, steps=8, guidance=7.5, size=None, num=1,
                 prompts=["a photo of sks cat", "a cup of coffee"], negatives=["a dog"]),
    "ddim_odd": dict(model="sd15", sampler="ddim", steps=6, guidance=4.0, size=(72, 56), num=1,
                     prompts=["a photo of sks cat"], negatives=["blurry"]),
    "velocity": dict(model="sd21v", sampler=None, steps=8, guidance=7.5, size=None, num=2, rescale=0.7,
                     prompts=["a photo of sks cat"], negatives=[]),
    "unguided": dict(model="sd21v", sampler="ddpm", steps=5, guidance=1.0, size=(64, 40), num=1,
                     prompts=["a cup of coffee"], negatives=[]),
    "euler_a": dict(model="sd15", sampler="euler-a", steps=6, guidance=5.0, size=None, num=1,
                    prompts=["a photo of sks cat", "a cup of coffee"], negatives=["a dog", "a photo"]),
    "euler": dict(model="sd15", sampler="euler", steps=6, guidance=7.5, size=None, num=1,
                  prompts=["a photo of sks cat"], negatives=[]),
    "dpmpp_2m": dict(model="sd15", sampler="dpm++2m", steps=8, guidance=7.5, size=None, num=1,
                     prompts=["a photo of sks cat"], negatives=[]),
    "dpmpp_2m_sde": dict(model="sd21v", sampler="dpm++2m-sde", steps=6, guidance=7.5, size=None, num=1,
                         prompts=["a photo of sks cat"], negatives=["a dog"]),
    "unipc": dict(model="sd21v", sampler="unipc", steps=7, guidance=7.5, size=(56, 64), num=1,
                  prompts=["a photo of sks cat"], negatives=["a dog"]),
}


def record_noise(scheduler, shape, generator):
    """Makes the scheduler take its noise from a list, which is returned and grows with every draw."""
    module, drawn = sys.modules[type(scheduler).__module__], []

    def randn_tensor(_shape, **_):
        drawn.append(torch.randn(shape, generator=generator))
        return drawn[-1].clone()

    if hasattr(module, "randn_tensor"):
        module.randn_tensor = randn_tensor
    return drawn


def make(name, case):
    pipe = diffusers.DiffusionPipeline.from_pretrained(MODELS / case["model"], safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if case["sampler"]:
        more = {"algorithm_type": "sde-dpmsolver++"} if case["sampler"] == "dpm++2m-sde" else {}
        pipe.scheduler = CLASSES[case["sampler"]].from_config(pipe.scheduler.config, **more)
    height, width = case["size"] or (8 * pipe.unet.config.sample_size,) * 2
    pictures = len(case["prompts"]) * case["num"]
    shape = (pictures, 4, height // 8, width // 8)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    latents = torch.randn(shape, generator=generator)
    noise = record_noise(pipe.scheduler, shape, generator)
    negatives = case["negatives"]
    if negatives and len(negatives) < len(case["prompts"]):
        negatives = negatives * len(case["prompts"])
    images = pipe(
        prompt=case["prompts"], negative_prompt=negatives or None, num_images_per_prompt=case["num"],
        num_inference_steps=case["steps"], guidance_scale=case["guidance"],
        guidance_rescale=case.get("rescale", 0.0), latents=latents.clone(), height=height, width=width,
    ).images
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:05}.png")
    save_file({"latents": latents, **{f"noise.{k}": x for k, x in enumerate(noise)}}, folder / "latents.safetensors")
    options = [word for prompt in case["prompts"] for word in ("--prompt", prompt)]
    options += [word for negative in case["negatives"] for word in ("--negative-prompt", negative)]
    options += ["--steps", str(case["steps"]), "--guidance", str(case["guidance"]), "--num", str(case["num"])]
    options += ["--sampler", case["sampler"]] if case["sampler"] else []
    options += ["--guidance-rescale", str(case["rescale"])] if "rescale" in case else []
    options += ["--height", str(height), "--width", str(width)] if case["size"] else []
    (folder / "case.json").write_text(json.dumps({"model": case["model"], "options": options}, indent=1) + "\n")
    print(name, len(images), "pictures,", len(noise), "draws")


@torch.no_grad()
def decode(model, tiled_too):
    """Latents and what the decoder makes of them, whole and in tiles."""
    vae = diffusers.AutoencoderKL.from_pretrained(MODELS / model / "vae")
    generator = torch.Generator().manual_seed(len(model))
    small, large = torch.randn((2, 4, 5, 7), generator=generator), torch.randn((1, 4, 9, 15), generator=generator)
    scaled = lambda x: x / vae.config.scaling_factor
    tensors = {"latents": small, "pixels": vae.decode(scaled(small)).sample.contiguous()}
    if tiled_too:
        vae.enable_tiling()
        tensors |= {"large_latents": large, "tiled_pixels": vae.decode(scaled(large)).sample.contiguous()}
    folder = HERE.parent / "vae"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{model}.safetensors")


if __name__ == "__main__":
    for name, case in CASES.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            make(name, case)
    if not sys.argv[1:] or "vae" in sys.argv[1:]:
        decode("sd15", True)
        decode("sd21v", False)
