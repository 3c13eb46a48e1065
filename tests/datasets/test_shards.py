"""Shards: tar files and tables, here and on a server, read like files; and what each refuses."""

from __future__ import annotations

import base64
import functools
import io
import json
import pickle
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation.policies import imagenet
from crucible.options import ConfigError
from datasets.image_folder import ImageFolderDataModule
from datasets.images import SampleError
from datasets.shards import ShardsDataModule, _ModelZoo, expanded
from lab.packing import pack

NAMES = ["ant", "bee", "cat"]


def picture(number: int, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 120, (*size[::-1], 3))
    pixels[..., number % 3] += 100
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_tar(
    path: Path, first: int, count: int, label: Callable[[int], dict[str, bytes]] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n in range(first, first + count):
            parts = {"jpg": picture(n), **(label(n) if label else {"cls": str(n % 3).encode()})}
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"part/{n:04}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """30 images in three shards for training, 6 in one for testing."""
    for shard in range(3):
        write_tar(tmp_path / "tars" / f"set-train-{shard:06}.tar", 10 * shard, 10)
    write_tar(tmp_path / "tars" / "set-test-000000.tar", 100, 6)
    return tmp_path / "tars"


def write_tables(root: Path, kind: str) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for split, first, count in (("train", 0, 30), ("test", 100, 6)):
        numbers = range(first, first + count)
        images = pa.array([{"bytes": picture(n), "path": f"{n:04}.jpg" if n % 2 else None} for n in numbers])
        table = pa.table({"image": images, "label": [n % 3 for n in numbers]}).replace_schema_metadata(
            metadata
        )
        root.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            parquet.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=7)
        else:
            (root / split).mkdir()
            with (
                pa.OSFile(str(root / split / "data-00000-of-00001.arrow"), "wb") as file,
                pa.ipc.new_stream(file, table.schema) as out,
            ):
                out.write_table(table, max_chunksize=8)
    return root


def made(root: Path | str | None, **options: Any) -> ShardsDataModule:
    settings = {"name": "shards", "batch_size": 4, "num_workers": 0, "cache": "none", "val_split": 0.2}
    settings |= {
        "train_transforms": imagenet.BaselineTransform(size=12),
        "test_transforms": imagenet.TestTransform(size=12),
    }
    module = ShardsDataModule(**settings | {"data_root_dir": None if root is None else str(root)} | options)
    module.check()
    return module


def images(module: ShardsDataModule, split: str = "train") -> list[torch.Tensor]:
    raw = module.samples(split).raw
    return [raw[i][0] for i in range(len(raw))]


def batches(module: ShardsDataModule) -> list[Any]:
    return list(module.train_dataloader())


class _Ranges(SimpleHTTPRequestHandler):
    """A server of files that answers for pieces of them, as object storage does."""

    requests: list[str] = []
    ranges = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        begin, end = 0, len(data)
        if wanted and self.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(end, int(last) + 1 if last else end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.requests.append(f"{self.command} {path.name} {begin}-{end}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if body:
            self.wfile.write(data[begin:end])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serve a folder; its address."""
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    running = []

    def serve(folder: Path, ranges: bool = True) -> str:
        handler = type("Handler", (_Ranges,), {"ranges": ranges, "requests": []})
        running.append(
            ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        )
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        serve.requests = handler.requests  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def test_tar_shards_are_found_by_name_and_read_by_number(tars: Path) -> None:
    module = made(tars)
    assert module.class_names == ["0", "1", "2"]
    assert len(module.samples("train").raw) == 30 and len(module.samples("test")) == 6
    raw = module.samples("train").raw
    assert raw.names[13] == "part/0013.jpg" and raw.targets.tolist() == [n % 3 for n in range(30)]
    assert raw.encoded(13) == picture(13)
    assert "4 tar shards: any image is read by itself; order and resume are exact" in module.remarks[0]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_hugging_face_have_their_classes_by_name(tmp_path: Path, kind: str) -> None:
    module = made(write_tables(tmp_path / "tables", kind))
    assert module.class_names == NAMES
    raw = module.samples("train").raw
    assert [raw.encoded(i) for i in (29, 0, 13)] == [picture(i) for i in (29, 0, 13)]
    assert raw.names[1].endswith("0000001-0001.jpg") and raw.names[2].endswith("0000002")
    assert ("row group (7 rows" in module.remarks[0]) == (kind == "parquet")


def test_all_kinds_give_the_same_batches_with_any_workers(tars: Path, tmp_path: Path) -> None:
    reference = batches(made(tars))
    others = [
        batches(made(tars, num_workers=2)), batches(made(write_tables(tmp_path / "p", "parquet"), num_workers=2)),
        batches(made(write_tables(tmp_path / "a", "arrow"))), batches(pickle.loads(pickle.dumps(made(tars)))),
    ]  # fmt: skip
    for other in others:
        for a, b in zip(reference, other, strict=True):
            assert (
                torch.equal(a.input, b.input)
                and torch.equal(a.target, b.target)
                and torch.equal(a.index, b.index)
            )


def test_a_server_of_pieces_gives_what_the_folder_does(tars: Path, server) -> None:
    address = server(tars)
    options = {"train_shards": "set-train-{000000..000002}.tar", "test_shards": ["set-test-000000.tar"]}
    remote = made(address, **options)
    local = made(tars, **options)
    assert remote.fingerprint() == local.fingerprint()
    assert "each image is a request: task=pack copies them here once" in remote.remarks[0]
    before = len(server.requests)
    again = made(None, train_shards=f"{address}/set-train-{{000000..000002}}.tar", num_workers=2)
    assert all(
        "GET" not in request for request in server.requests[before:] if "0-" in request
    )  # the indices are kept
    for a, b in zip(batches(again), batches(made(tars, train_shards=options["train_shards"])), strict=True):
        assert torch.equal(a.input, b.input)


def packed_of(tars: Path, out: Path, **options: Any) -> ImageFolderDataModule:
    """The data of a pack that is made of shards."""
    source = {
        "_target_": "datasets.shards.ShardsDataModule", "name": "x", "data_root_dir": str(tars), "num_workers": "auto",
    }  # fmt: skip
    how = {"size": None, "quality": 90, "verify": False}
    assert pack({"out": str(out), "pack": how, "data": {"module": source, "task": "classification"}}) == 0
    return ImageFolderDataModule(
        name="x", batch_size=4, num_workers=0, val_split=0.2, data_root_dir=str(out),
        train_transforms=imagenet.BaselineTransform(size=12), test_transforms=imagenet.TestTransform(size=12),
        **options,
    )  # fmt: skip


def test_what_is_decoded_of_shards_and_packs_lies_in_the_users_cache(
    tars: Path, tmp_path: Path, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """not beside a source that has no folder here, nor in the folder that the command is given in"""
    pytest.importorskip("lmdb")
    where = tmp_path / "where"
    where.mkdir()
    monkeypatch.chdir(where)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = server(tars)
    options = {"train_shards": "set-train-{000000..000002}.tar", "test_shards": ["set-test-000000.tar"]}
    auto = {"cache": "auto"}
    modules = [
        made(tars, **auto), made(address, **options, **auto),
        made(None, train_shards=str(tars / "set-train-*.tar"), **auto), packed_of(tars, tmp_path / "pack"),
    ]  # fmt: skip
    for module in modules:
        module.check()
        assert hasattr(module.train_dataset, "inputs"), "decoded once: all have one size"
        sources = (p for source in (tars, tmp_path / "pack", where) for p in source.rglob(".decoded"))
        assert not list(sources) and not list(where.iterdir())
    assert len(list((tmp_path / "cache" / "crucible" / "decoded").glob("*.npy"))) >= 2


def test_a_server_without_pieces_is_refused(tars: Path, server) -> None:
    address = server(tars, ranges=False)
    with pytest.raises(
        ConfigError, match=r"cannot be read by the piece .* byte ranges; else copy the shards here"
    ):
        made(address, train_shards="set-train-000000.tar")
    with pytest.raises(ConfigError, match=r"none\.tar: no such file"):
        made(address, train_shards="none.tar")
    with pytest.raises(ConfigError, match=r"train_shards is missing: what is in http.* cannot be listed"):
        made(address)


def test_an_index_is_made_anew_when_its_shard_changes(tars: Path) -> None:
    before = made(tars).fingerprint()
    assert made(tars).fingerprint() == before
    write_tar(tars / "set-train-000001.tar", 50, 12)
    module = made(tars)
    assert len(module.samples("train").raw) == 32 and module.fingerprint() != before
    (tars / "set-train-000002.tar").rename(tars / "set-train-000003.tar")
    assert made(tars).fingerprint() == module.fingerprint()


def test_labels_may_be_names_or_fields_and_have_a_file_of_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "names" / "0.tar", 0, 9, lambda n: {"cls": NAMES[n % 3].encode()})
    assert made(tmp_path / "names").class_names == NAMES
    write_tar(
        tmp_path / "fields" / "0.tar", 0, 9, lambda n: {"json": json.dumps({"a": {}, "kind": n % 3}).encode()}
    )
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    module = made(tmp_path / "fields", label="json.kind", classes_file=str(tmp_path / "classes.txt"))
    assert module.class_names == NAMES
    with pytest.raises(
        ConfigError, match=r"0000\.json: has none of label, cls.*data\.module\.label=json\.NAME"
    ):
        made(tmp_path / "fields")


def _without_label(root: Path) -> None:
    write_tar(root / "a.tar", 0, 4, lambda n: {"txt": b"a cat"})


def _other_split(root: Path) -> None:
    write_tar(root / "train-0.tar", 0, 6)
    write_tar(root / "more.tar", 9, 6)


def _compressed(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))


def _more_classes(root: Path) -> None:
    write_tar(root / "train.tar", 0, 9)
    write_tar(root / "val.tar", 0, 9, lambda n: {"cls": b"7"})


WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "empty": (lambda root: root.mkdir(), {}, r"holds no shards \(\.tar"),
    "no label": (_without_label, {}, r"sample part/0000 has no label \(cls, json\): it has jpg, txt; data\.module"),
    "no picture": (lambda r: write_tar(r / "a.tar", 0, 4), {"image": "webp"}, r"no picture \(webp\)"),
    "no samples": (lambda r: write_tar(r / "a.tar", 0, 0), {}, r"a\.tar: holds no samples"),
    "which split": (_other_split, {}, r"of which split is more\.tar, beside those that say train"),
    "compressed": (_compressed, {}, "unpack a compressed one"),
    "one class": (lambda r: write_tar(r / "a.tar", 0, 4, lambda n: {"cls": b"one"}), {}, "holds one class only"),
    "missing": (lambda r: write_tar(r / "a.tar", 0, 4), {"train_shards": "b-{0..1}.tar"}, r"b-0\.tar: no such file"),
    "no match": (lambda r: write_tar(r / "a.tar", 0, 4), {"train_shards": "b*.tar"}, "there are no such files"),
    "not a shard": (lambda r: r.mkdir() or (r / "x.zip").touch(), {"train_shards": "x.zip"}, r"x\.zip: not a shard"),
    "more classes": (_more_classes, {}, r"val\.tar: has label 7; the training shards have 3 classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, name: str) -> None:
    write, options, said = WRONG[name]
    write(tmp_path / "shards")
    with pytest.raises(ConfigError, match=said):
        made(tmp_path / "shards", **options)


def test_a_damaged_picture_names_its_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", 0, 9)
    write_tar(tmp_path / "b.tar", 9, 3)
    raw = made(tmp_path).samples("train").raw
    content = bytearray((tmp_path / "b.tar").read_bytes())
    content[content.index(picture(9)) : content.index(picture(9)) + 300] = bytes(300)
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(SampleError, match=r"part/0009\.jpg \(.*b\.tar\): cannot be read as an image"):
        raw[int(np.flatnonzero(raw.numbers == 9)[0])] if 9 in raw.numbers else made(tmp_path).samples(
            "test"
        ).raw[0]


def test_braces_count_and_list() -> None:
    assert expanded("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expanded("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expanded("s3://x/y.tar") == ["s3://x/y.tar"]


def as_torch_toolbox_did(value: Any) -> bytes:
    """`pyarrow.serialize((bytes, int))`, `(int)` or `([texts])` of versions up to 11, made by today's."""
    pa = pytest.importorskip("pyarrow")

    def union(kinds: dict[str, Any], codes: list[int], places: list[int]) -> Any:
        children = [pa.nulls(0), *kinds.values()]
        types, offsets = pa.array(codes, pa.int8()), pa.array(places, pa.int32())
        return pa.UnionArray.from_dense(types, offsets, children, ["0", *kinds], list(range(len(children))))

    if isinstance(value, int):
        whole = union({"2": pa.array([value])}, [1], [0])
    else:
        if isinstance(value, tuple):
            inner = union({"4": pa.array([value[0]]), "2": pa.array([value[1]])}, [1, 2], [0, 0])
        else:
            inner = union({"5": pa.array(value)}, [1] * len(value), list(range(len(value))))
        whole = union({"12": pa.ListArray.from_arrays([0, len(inner)], inner)}, [1], [0])
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([whole], names=["list"])
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(16) + sink.getvalue().to_pybytes()


# what pyarrow 11.0.0 makes of (a beginning of a JPEG, 7), compressed by zlib
RECORDED = (
    "c-oayOHRW;4D}>w6Vea{C?!CE@()lTE#<#}%dn^fQYE_R0XP5)4$&iU0G2%f3yy*a_KZ`7Q6z+`8ISGfXU{kV_$?XANB~G>`4B)A"
    "D&XM>ML1{!S|08W@91Xz{+(rLg%O^c?6Yun5s<L`(0dvX)k~(Z6AUnqr~N@4&ryM2GOpbL_`*7=#)UEZT8y)Cy;2RT$-ds;{t;Bq"
    "bQ9fqUe_+vCGKa<X;H11^YeIzIXrNg1H>I}Z#u`JoVt-iJ&Z8^sWGAqlj0g<Tw=t-4qf%alHXtFL?t<n`ssNMh2|v*purOh6cgBv"
    "${$W9?4up1>CsHb{I;U-4b%$f+|PHO^dXJ!MjE(?bw1ms5l@W##E7S?Z&~*ZeBZ#6xW+xo#Ee`2#Q$aIoT7x7?vj0E7_*&9)%B+Q"
    "S}+~X$l1C1`a)wdT3TL-SJ&2?8=G6(JG*<y{=s4E==daUcTT%!=NFe(*Ei~p`Tvyk58a4J<p"
)


def test_lmdb_files_of_the_modelzoo_are_read_without_pickle(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    for split, first, count in (("train", 0, 30), ("test", 100, 6)):
        values = {str(n): as_torch_toolbox_did((picture(first + n), (first + n) % 3)) for n in range(count)}
        values |= {"__len__": as_torch_toolbox_did(count), "classes": as_torch_toolbox_did(NAMES)}
        with (
            lmdb.open(str(tmp_path / f"{split}.lmdb"), subdir=False, map_size=1 << 24) as environment,
            environment.begin(write=True) as out,
        ):
            for key, value in values.items():
                out.put(key.encode(), value)
    module = made(tmp_path, num_workers=2)
    assert module.class_names == NAMES and len(module.samples("test")) == 6
    write_tar(tmp_path / "tars" / "train.tar", 0, 30)
    for a, b in zip(
        batches(module), batches(made(tmp_path / "tars", test_shards=None, test_split=0.0)), strict=True
    ):
        assert torch.equal(a.input, b.input) and torch.equal(a.target, b.target)
    recorded = zlib.decompress(base64.b85decode(RECORDED))
    with (
        lmdb.open(str(tmp_path / "one.lmdb"), subdir=False, map_size=1 << 20) as environment,
        environment.begin(write=True) as out,
    ):
        out.put(b"0", recorded)
        out.put(b"1", pickle.dumps((b"x", 1)))
    records = _ModelZoo(str(tmp_path / "one.lmdb"))
    assert records.sample(0) == (b"\xff\xd8\xff" + bytes(range(60)), 7)
    with pytest.raises(
        ConfigError, match="record 1 is not as torch-toolbox wrote it; pickled records are not read"
    ):
        records.sample(1)


def test_shards_become_a_pack_with_the_same_batches(tars: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    packed = packed_of(tars, tmp_path / "pack", cache="none")
    packed.check()
    for a, b in zip(batches(packed), batches(made(tars)), strict=True):
        assert torch.equal(a.input, b.input) and torch.equal(a.target, b.target)


@pytest.mark.slow
def test_another_package_named_datasets_is_in_nobodys_way(shell, tmp_path: Path) -> None:
    root = write_tables(tmp_path / "tables", "parquet")
    foreign = tmp_path / "site" / "datasets"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise ImportError('the package of another')\n")
    run = shell(
        "data=parquet", f"data.module.data_root_dir={root}", "data.module.batch_size=8", "data.input_size=16",
        "data.module.num_workers=1", "model=cifar_resnet", "logger.wandb=null", "callbacks.plots=null",
        "trainer.max_epochs=1", env={"PYTHONPATH": str(foreign.parent)}, real=True,
    )  # fmt: skip
    assert run.status == 0, run.err
    assert "order and resume are exact, as of files" in " ".join(run.out.split())
