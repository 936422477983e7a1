# SPDX-License-Identifier: Apache-2.0
"""From the times of the programs to those of images: evaluations, seconds, dollars."""

from dataclasses import dataclass

from k3jax.config import SamplerConfig
from k3jax.sampling.denoise import loop_rows
from k3jax.sampling.samplers import make_sampler


@dataclass(frozen=True)
class Evaluations:
    """Steps of the denoising loop.

    Attributes:
        guided: steps with guidance, that run the U-Net on each latent twice.
        plain: steps without, that run it once.
    """

    guided: int
    plain: int

    @property
    def steps(self) -> int:
        return self.guided + self.plain

    @property
    def passes(self) -> int:
        """U-Net passes an image."""
        return 2 * self.guided + self.plain

    @property
    def runs(self) -> dict[str, int]:
        """How often each program of `workload.COMPONENT` runs for a batch."""
        return {"encode": 1, "denoise": self.guided, "denoise_plain": self.plain, "decode": 1}


def evaluations(sampler: SamplerConfig, interval: tuple[int, int] | None = None) -> Evaluations:
    """What a sampler does, counted in the table that the loop runs over.

    Args:
        interval: first and last guided step, or None for all.

    Raises:
        ValueError: settings that the sampler cannot run.
    """
    table = make_sampler(sampler)
    rows = loop_rows(table, interval)
    if not table.guided or sampler.guidance_scale == 0:
        return Evaluations(0, table.num_steps)
    guided = int(rows["guide"].sum()) if "guide" in rows else table.num_steps
    return Evaluations(guided, table.num_steps - guided)


def baseline(sampler: SamplerConfig) -> tuple[SamplerConfig, str]:
    """What a speed-up is measured against: the model's own sampler, always guided; and its name.

    A model that is distilled to do without guidance is measured against the released base model.
    """
    if make_sampler(sampler).guided and sampler.guidance_scale > 0:
        return sampler, f"{sampler.num_inference_steps} guided steps of {sampler.name}"
    base = SamplerConfig()
    return base, f"the base model's {base.num_inference_steps} guided steps of {base.name}"


@dataclass(frozen=True)
class Totals:
    """Of one batch, from the tokens to the pixels.

    Attributes:
        images: in the batch, over the whole slice.
        seconds: of the batch; `encode`, `denoise` and `decode` are its parts.
        images_per_second_per_chip: throughput.
        share_of_peak: of the chips' bfloat16 peak, over the whole batch.
        baseline: what the speed-up is measured against.
        speed_up: of the whole batch against that.
        dollars_per_1000: None without a price.
    """

    images: int
    chips: int
    seconds: float
    encode: float
    denoise: float
    decode: float
    images_per_second_per_chip: float
    share_of_peak: float
    baseline: str
    speed_up: float
    dollars_per_1000: float | None


def total(
    *,
    images: int,
    chips: int,
    peak: float,
    seconds: dict[str, float],
    flops: dict[str, float],
    counts: Evaluations,
    against: Evaluations,
    baseline: str,
    price: float | None,
) -> Totals:
    """Adds up one batch.

    Args:
        images: over the whole slice.
        peak: FLOP/s of a chip.
        seconds, flops: of one run on each chip by the names of `workload.COMPONENT`; programs that
            are left out are missing.
        counts, against: evaluations of this sampler and of the baseline's.
        price: dollars for a chip and an hour.
    """
    guided, plain = _step_times(seconds)
    encode, decode = seconds.get("encode", 0.0), seconds.get("decode", 0.0)
    denoise = counts.guided * guided + counts.plain * plain
    batch = encode + denoise + decode
    work = sum(counts.runs[name] * count for name, count in flops.items())
    before = encode + against.guided * guided + against.plain * plain + decode
    rate = images / batch / chips
    return Totals(
        images=images,
        chips=chips,
        seconds=batch,
        encode=encode,
        denoise=denoise,
        decode=decode,
        images_per_second_per_chip=rate,
        share_of_peak=work / (batch * peak),
        baseline=baseline,
        speed_up=before / batch,
        dollars_per_1000=None if price is None else 1000 * price / 3600 / rate,
    )


def _step_times(seconds: dict[str, float]) -> tuple[float, float]:
    """Of a guided step and of a plain one; one that was not compiled is half or twice the other."""
    guided, plain = seconds.get("denoise"), seconds.get("denoise_plain")
    if guided is None and plain is None:
        return 0.0, 0.0
    if guided is None:
        return 2 * plain, plain
    return guided, guided / 2 if plain is None else plain
