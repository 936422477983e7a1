# SPDX-License-Identifier: Apache-2.0
"""A data set as one HTML page that opens from disk: thumbnails, prompts, seeds, a search box.

Thumbnails are in the page itself; those of a large set are in scripts next to it, because a page
that is opened from disk may load scripts, but no other files.
"""

import base64
import html
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

from PIL import Image
from tqdm import tqdm

from k3jax.checkpoints.digests import abbreviated
from k3jax.images.decoding import opened
from k3jax.synthesis.metadata import Column, columns_of, finished_shards, read_sidecar
from k3jax.synthesis.run_manifest import RunManifest
from k3jax.synthesis.shard_formats import read_shard
from k3jax.synthesis.store import Store


PAGE, FOLDER = "gallery.html", "gallery"
PER_PAGE = 60
INLINE_IMAGES = 2000  # about 20 MB; a larger set gets its thumbnails in a folder
THUMBNAIL = 320  # pixels of the longer side


def write_gallery(
    store: Store,
    manifest: RunManifest,
    most: int = 100_000,
    progress: bool = False,
    target: Store | None = None,
) -> list[str]:
    """Writes gallery.html, and a folder gallery/ if the data set is a large one.

    Args:
        most: images shown; of a larger set, every n-th.
        target: the folder to write into; None: the data set's own.

    Returns:
        The names of the page and, if there is one, of the folder.

    Raises:
        ValueError: no shard is finished, or one is damaged.
    """
    inside = target is None
    target = store if inside else target
    shards = sorted(finished_shards(store, manifest.layout))
    if not shards:
        raise ValueError(f"{store} has no finished shard yet.")
    total = sum(len(range(*manifest.layout.range(shard))) for shard in shards)
    every = -(-total // most)
    large = -(-total // every) > INLINE_IMAGES
    columns = [column for column in columns_of(manifest) if column.caption]
    images: list[list[Any]] = []
    waiting: list[str | None] = []
    chunks: list[str] = []

    def flush() -> None:
        number, text = len(chunks), json.dumps(waiting)
        if large:
            content = f"k3jaxThumbnails({number}, {text});\n"
            target.write(f"{FOLDER}/{number}.js", content.encode())
            chunks.append("")
        else:
            chunks.append(
                f'<script type="application/json" id="thumbnails-{number}">{text}</script>'
            )
        waiting.clear()

    if inside:  # another folder may have a gallery/ of its own
        store.delete(FOLDER)
    bar = tqdm(total=total, unit="image", desc="gallery", disable=not progress)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for shard in shards:
            links = inside and manifest.layout.format == "files"
            rows = _shown(store, manifest, shard, every, links)
            # `map` starts all at once: a shard's thumbnails, no more, are in memory.
            names = [f"{store}/{row['shard']}, image {row['key']}" for row in rows]
            contents = [row.pop("content", None) for row in rows]
            thumbnails = pool.map(thumbnail, contents, names)
            for row, small in zip(rows, thumbnails, strict=True):
                images.append(_entry(row, columns))
                waiting.append(small)
                if len(waiting) == PER_PAGE:
                    flush()
            bar.update(len(range(*manifest.layout.range(shard))))
    if waiting:
        flush()
    target.write(PAGE, _page(store, manifest, columns, images, chunks, total).encode())
    return [PAGE, FOLDER] if large else [PAGE]


def thumbnail(content: bytes | None, name: str) -> str | None:
    """An image file -> a small WebP in base64.

    Raises:
        ValueError: it is damaged; the message starts with `name`.
    """
    if content is None:
        return None
    try:
        with opened(io.BytesIO(content), name) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = image.convert("RGB")
    except ValueError:
        raise ValueError(
            f"{name} cannot be decoded: `k3jax verify --repair` makes it again."
        ) from None
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=78, method=2)
    return base64.b64encode(file.getvalue()).decode()


def _shown(
    store: Store, manifest: RunManifest, shard: int, every: int, links: bool
) -> list[dict[str, Any]]:
    """The rows of a shard that are shown, each with its image's bytes, in the prompts' order."""
    layout = manifest.layout
    name = layout.data(shard)
    rows = read_sidecar(store, layout.sidecar(shard)).rows
    rows = {row["key"]: dict(row, shard=name) for row in rows if row["index"] % every == 0}
    extension = manifest.settings.encoding.extension
    try:
        for image in read_shard(store, name, layout.format):
            if image.key in rows:
                rows[image.key]["content"] = image.content
                if links:  # to the image's own file
                    rows[image.key]["link"] = f"{name}/{image.key}.{extension}"
    except Exception as error:
        raise ValueError(
            f"{store}/{name} cannot be read ({error}); `k3jax verify --repair` mends it."
        ) from None
    return list(rows.values())


def _entry(row: Mapping[str, Any], columns: Sequence[Column]) -> list[Any]:
    """The values of a row: its columns, then its shard, and the address of its file or None."""
    values = [row.get(column.name) for column in columns]
    # Numbers of JavaScript have 53 bits.
    values = [str(v) if isinstance(v, int) and abs(v) >= 1 << 53 else v for v in values]
    # In an address, a % of the file's name is written as %25.
    return [*values, row["shard"], row["link"].replace("%", "%25") if "link" in row else None]


def _page(
    store: Store,
    manifest: RunManifest,
    columns: Sequence[Column],
    images: list[list[Any]],
    chunks: list[str],
    total: int,
) -> str:
    settings, name = manifest.settings, str(store).rstrip("/").rsplit("/", 1)[-1]
    sampler = settings.sampler
    shown = (
        f"{len(images):,} images"
        if len(images) == total
        else (f"{len(images):,} of {total:,} images")
    )
    facts = (
        f"{shown} \u00b7 {sampler.name}, {sampler.num_inference_steps} steps, guidance "
        f"{sampler.guidance_scale:g} \u00b7 run seed {settings.seed} \u00b7 weights "
        f"{abbreviated(manifest.weights['fingerprint'])}"
    )
    data = {
        "name": name,
        "facts": facts,
        "per_page": PER_PAGE,
        "folder": FOLDER,
        "command": f"k3jax regenerate {shlex.quote(str(store))}",
        "names": [*(column.name for column in columns), "shard", "link"],
        "captions": {column.name: column.caption for column in columns} | {"shard": "shard"},
        "images": images,
    }
    parts = {
        "title": html.escape(name),
        "data": _in_script(data),
        "thumbnails": "\n".join(filter(None, chunks)),
    }
    template = (files("k3jax.synthesis") / "gallery_page.html").read_text()
    return "".join(_filled(template, parts))


def _filled(template: str, parts: Mapping[str, str]) -> Iterator[str]:
    """The template with its {{names}} replaced, but not those in the replacements."""
    for piece in template.split("{{"):
        name, closed, rest = piece.partition("}}")
        yield parts[name] + rest if closed and name in parts else piece


def _in_script(value: Any) -> str:
    """JSON in which no prompt can end the script: every < is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
