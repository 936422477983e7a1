# SPDX-License-Identifier: Apache-2.0
"""Makes the files of this folder. It ran once, at commit db2d228 (2026-11-29, k3jax 0.1.0).

    python tests/older/make.py

It is kept for the record, and need not run on later code: what it wrote is read by
test_older_files.py, for ever. Files that newer code writes belong into other archives.

checkpoints.tar.xz   base: a checkpoint with random weights, as small as the architecture can be;
                     sharing: another text projection, all else is base's; lora: of base
generated.tar.xz     a.png by `k3jax generate`, and the user's cache with a map of previews
sets.tar.xz          data sets by `k3jax synthesize` and their prompt files: webdataset, parquet,
                     files, and unfinished, of which only shard 0 was made
runs.tar.xz          runs by `k3jax train` from base, 2 steps each: whole, of which gradients are
                     clipped to 0, so that its state compresses, and style, a LoRA; their config
                     files, and the cache of latents
exports.tar.xz       by `k3jax export`: base in the original layout, another in that of diffusers
expected.json        digests and losses, of what these files hold or lead to
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from k3jax import Kandinsky3Pipeline
from k3jax.abstract import COMPONENTS, abstract_module
from k3jax.checkpoint import CheckpointWriter, iterate_leaves, read_checkpoint, save_module
from k3jax.cli.main import main
from k3jax.config import (
    LoraConfig,
    ModelConfig,
    MoVQConfig,
    SamplerConfig,
    TextEncoderConfig,
    TextProjectionConfig,
    UNetConfig,
    to_dict,
)
from k3jax.lora_format import save_lora


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from random_checkpoint import write_byte_tokenizer  # noqa: E402


FOLDER = Path("/tmp/k3jax-older")
"""Where they are made. Some of them say so inside; none may need it later."""

WIDTH = 8
MODEL = ModelConfig(
    TextEncoderConfig(vocab_size=259, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2),
    TextProjectionConfig(d_model=WIDTH, cross_attention_dim=WIDTH),
    UNetConfig(
        init_channels=4,
        block_out_channels=(8,),
        layers_per_block=2,
        time_embedding_dim=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        groups=4,
        add_cross_attention=(True,),
        add_self_attention=(True,),
    ),
    MoVQConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, norm_num_groups=8),
    sample_size=64,
    sampler=SamplerConfig(num_inference_steps=2, guidance_scale=2.0, threshold_percentile=0.97),
)
LEVELS = dataclasses.replace(
    MODEL,
    text_projection=dataclasses.replace(MODEL.text_projection, null_embedding=False),
    unet=UNetConfig(
        init_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=2,
        time_embedding_dim=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        groups=4,
    ),
    movq=dataclasses.replace(MODEL.movq, num_vq_embeddings=2),
    conditioning="diffusers",
    sample_size=128,
    sampler=SamplerConfig("ddim", num_inference_steps=7, guidance_scale=2.5, eta=0.5),
)
"""With two levels, as diffusers' U-Net has at least."""

ROWS = [
    {"id": "circle", "prompt": "a red circle"},
    {"id": "cat/1", "prompt": "рыжий кот", "negative_prompt": "dull", "seed": 5},
    {"id": "square", "prompt": "a blue square", "guidance_scale": 0.5},
]
SYNTHESIZE = ["--size", "64x64", "--dtype", "float32", "--seed", "11", "--samples-per-shard", "2"]

CONFIG = '''"""A run of the tests."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.train = train = ConfigDict()
    train.steps = 2
    train.batch_size = 2
    train.dtype = "float32"
    train.frozen_dtype = "float32"
    train.remat = False
    train.log_every = 1
    train.sample_every = 0
    train.data = ConfigDict()
    train.data.kind = "scenes"
    train.data.num_scenes = 8
    train.data.resolution = 64
    train.data.aspect_buckets = False
    train.optimizer = ConfigDict()
    train.optimizer.warmup_steps = 1
    train.optimizer.learning_rate = 1e-3
{more}    return config
'''
WHOLE = """    train.ema_decay = 0.9
    train.checkpoint = ConfigDict()
    train.checkpoint.every = 2
    train.optimizer.max_grad_norm = 1e-300
"""
STYLE = """    train.ema_decay = 0.9
    train.lora = ConfigDict()
    train.lora.rank = 1
    train.lora.targets = ("to_q",)
"""


def make() -> None:
    """Everything."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.chdir(FOLDER)
    os.environ["XDG_CACHE_HOME"] = str(FOLDER / "cache")
    expected = {"checkpoints": checkpoints(), "generated": generated(), "sets": sets()}
    expected |= {"runs": runs(), "exports": exports()}
    text = json.dumps(expected, indent=1, sort_keys=True) + "\n"
    (HERE / "expected.json").write_text(text)
    pack("checkpoints", "base", "sharing", "lora")
    pack("generated", "a.png", "cache/k3jax/previews")
    pack(
        "sets",
        "prompts.jsonl",
        "pictures.jsonl",
        "start.png",
        "webdataset",
        "parquet",
        "files",
        "unfinished",
    )
    pack("runs", "whole.py", "style.py", "whole", "style", "latents")
    pack("exports", "diffusers", "original")


def checkpoints() -> dict:
    """base, sharing and lora."""
    write_byte_tokenizer("tokenizer")
    source = {"layout": "random", "note": "random weights of tests/older"}
    with CheckpointWriter("base") as writer:
        writer.add_tokenizer("tokenizer")
        for number, name in enumerate(COMPONENTS):
            save_module(writer, name, random_module(name, number))
        writer.commit(MODEL, source, "float32")
    with CheckpointWriter("sharing") as writer:
        writer.add_tokenizer("tokenizer")
        for name in COMPONENTS:
            if name == "text_projection":
                save_module(writer, name, random_module(name, 9))
            else:
                writer.share(name, "base")
        writer.commit(MODEL, source, "float32")
    base = read_checkpoint("base")
    rng = np.random.default_rng(7)
    weights = {}
    for name, array in iterate_leaves(base, "unet"):
        if name.endswith("to_q.kernel"):
            wide, high = array.shape
            pair = {"a": eighths(rng, (wide, 2), 1.0), "b": eighths(rng, (2, high), 1.0)}
            weights[name.removesuffix(".kernel")] = pair
    config = LoraConfig(rank=2, alpha=4.0, targets=("to_q",))
    save_lora("lora", weights, config, base.fingerprint)
    return {
        **{name: described(read_checkpoint(name)) for name in ("base", "sharing")},
        "lora": lora_digest("lora"),
    }


def generated() -> dict:
    """a.png, the same with the LoRA and of the other checkpoint, and a map of previews."""
    words = ["--seed", "3", "--negative-prompt", "dull", "--dtype", "float32", "--steps", "2"]
    run("generate", "a red circle", "--checkpoint", "base", "--output", "a.png", *words)
    words = [*words, "--output", "other.png", "--overwrite"]
    run("generate", "a red circle", "--checkpoint", "sharing", *words)
    sharing = small("other.png")
    run("generate", "a red circle", "--checkpoint", "base", "--lora", "lora", *words)
    pipe = Kandinsky3Pipeline.from_pretrained("base", dtype="float32")
    shown = []
    pipe("a red circle", num_inference_steps=2, callback=shown.append, callback_steps=2)
    return {
        "base": small("a.png"),
        "sharing": sharing,
        "lora": small("other.png"),
        "preview_map": np.asarray(shown[0].map).tolist(),
    }


def sets() -> dict:
    """Three data sets that are finished, in each format, and one that is not."""
    write_jsonl("prompts.jsonl", ROWS)
    Image.open("a.png").save("start.png")
    picture = {"id": "changed", "prompt": "a cat", "image": "start.png", "strength": 0.5}
    write_jsonl("pictures.jsonl", [ROWS[0], picture])
    prompts = ["prompts.jsonl", "webdataset", "--checkpoint", "base", *SYNTHESIZE]
    run("synthesize", *prompts, "--image-format", "png")
    prompts[1] = "unfinished"
    run("synthesize", *prompts, "--image-format", "png", "--jobs", "2", "--job", "0")
    prompts[:2] = ["pictures.jsonl", "parquet"]
    run("synthesize", *prompts, "--lora", "lora", "--lora-scale", "0.5")
    prompts[1] = "files"
    run("synthesize", *prompts, "--image-format", "webp", "--images-per-prompt", "1")
    for name in ("webdataset", "unfinished", "parquet", "files"):
        run("verify", name, code=int(name == "unfinished"))
        shutil.rmtree(Path(name) / "metrics")  # times and the name of this machine
    return {}


def runs() -> dict:
    """Both runs of 2 steps, and copies of them that went on to 3."""
    Path("whole.py").write_text(CONFIG.format(more=WHOLE))
    Path("style.py").write_text(CONFIG.format(more=STYLE))
    losses = {}
    for name in ("whole", "style"):
        words = ["train", "--checkpoint", "base", "--config", f"{name}.py"]
        words += ["--config.train.data.cache=latents"]
        run(*words, "--output", name)
        shutil.rmtree(Path(name) / "tensorboard")  # names this machine
        shutil.copytree(name, f"longer_{name}")
        run(*words, "--output", f"longer_{name}", "--steps", "3")
        lines = Path(f"longer_{name}/metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    return {
        "losses": losses,
        "whole": described(read_checkpoint("whole/checkpoint")),
        "style": lora_digest("style/lora"),
        "longer": lora_arrays("longer_style/lora"),
    }


def exports() -> dict:
    """base in the original layout, and a model that diffusers has in its own."""
    with CheckpointWriter("levels") as writer:
        writer.add_tokenizer("tokenizer")
        for number, name in enumerate(COMPONENTS):
            save_module(writer, name, random_module(name, number, LEVELS))
        writer.commit(LEVELS, {"layout": "random"}, "float32")
    run("export", "base", "original", "--layout", "original")
    run("export", "levels", "diffusers", "--layout", "diffusers")
    expected = {}
    for layout in ("original", "diffusers"):
        run("convert", layout, f"back_{layout}")
        back = read_checkpoint(f"back_{layout}")
        expected[layout] = {**described(back), "config": to_dict(back.config)}
    return expected


def random_module(name: str, seed: int, model: ModelConfig = MODEL) -> nnx.Module:
    """Weights that compress well, as many of them are 0 or repeat; no two arrays are equal."""
    module = abstract_module(name, model)
    for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(module))):
        shape, last = variable.get_value().shape, path[-1]
        rng = np.random.default_rng([seed, *shape])
        if last == "kernel":
            fan_in = np.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
            values = eighths(rng, shape, float(fan_in) ** -0.5)
        elif last == "scale" or "conv_y" in path:
            values = 1 + eighths(rng, shape, 0.1)
        else:
            values = eighths(rng, shape, 0.1 if last == "bias" else 1.0)
        values.flat[number % values.size] += 0.125 * (1 + number // values.size)
        leaf = module
        for part in path:
            leaf = leaf[part] if isinstance(part, int) else getattr(leaf, part)
        leaf.set_value(jnp.asarray(values))
    return jax.device_put(module, jax.local_devices()[0])


def eighths(rng: np.random.Generator, shape, deviation: float) -> np.ndarray:
    """float32 of about this deviation: a few of 1/2 where it is small."""
    if deviation < 0.5:
        chosen = rng.random(shape) < (deviation / 0.5) ** 2
        return (chosen * rng.choice([-0.5, 0.5], shape)).astype(np.float32)
    return (np.rint(rng.standard_normal(shape) * deviation * 8) / 8).astype(np.float32)


def run(*words, code: int = 0) -> None:
    """A command, in this process."""
    assert main([str(word) for word in words]) == code, words


def described(checkpoint) -> dict:
    """Fingerprint, and the digests of the arrays of each component that lies there itself."""
    own = [name for name, at in checkpoint.component_paths.items() if at.parent == checkpoint.path]
    return {
        "fingerprint": checkpoint.fingerprint,
        "components": {name: digest_of_all(iterate_leaves(checkpoint, name)) for name in own},
        "parts": sorted(own),
    }


def lora_arrays(path) -> dict:
    """Name -> values."""
    return {name: array.tolist() for name, array in np.load(f"{path}/weights.npz").items()}


def lora_digest(path) -> str:
    """Of all arrays."""
    return digest_of_all(np.load(f"{path}/weights.npz").items())


def digest_of_all(arrays) -> str:
    """Of names, dtypes, shapes and bytes."""
    text = "".join(f"{name} {digest(array)}\n" for name, array in sorted(arrays))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(array) -> str:
    """Of dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    head = f"{array.dtype.name} {array.shape}\n".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def small(path) -> list:
    """Every eighth pixel of an image."""
    return np.asarray(Image.open(path).convert("RGB"))[4::8, 4::8].tolist()


def write_jsonl(path, rows) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text)


def pack(name: str, *parts: str) -> None:
    """Packs files and folders, without owners and dates, and without locks."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if Path(info.name).name.startswith(".") and info.name.endswith(("lock", ".part")):
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    packed = io.BytesIO()
    with contextlib.closing(tarfile.open(fileobj=packed, mode="w:xz", preset=9)) as archive:
        for part in parts:
            archive.add(part, filter=plain)
    (HERE / f"{name}.tar.xz").write_bytes(packed.getvalue())


if __name__ == "__main__":
    make()
