"""The classifier's parts that need no framework: sheets, pixels, measures, collections."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from herbarium import metrics, model
from herbarium.images import Unreadable, decode, decode_all, mean_colours
from herbarium.sheets import draw_sheet, draw_specimens, label_of
from herbarium.sources import (
    BadCollection,
    Drawn,
    read_collection,
    split_collection,
    split_drawn,
)
from PIL import Image, ImageDraw

SEED = 7


def jpeg(shade: int, *, size: tuple[int, int] = (96, 128), mode: str = "RGB") -> bytes:
    image = Image.new("RGB", size, (shade, shade // 2, 40))
    ImageDraw.Draw(image).line((0, 0, *size), fill=(255, 255, 255), width=3)
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG")
    return file.getvalue()


def test_a_sheet_is_the_same_wherever_it_is_drawn() -> None:
    together = {(s.specimen, s.sheet): s for s in draw_specimens(range(30), seed=SEED)}
    assert len(together) > 30
    assert together["17", "0"] == draw_sheet(17, 0, seed=SEED)
    assert together["17", "0"].jpeg != draw_sheet(17, 0, seed=SEED + 1).jpeg
    assert len({sheet.jpeg for sheet in together.values()}) == len(together)


def test_a_specimen_has_one_class_and_no_more_sheets_than_it_has() -> None:
    for sheet in draw_specimens(range(20), seed=SEED):
        assert sheet.label == label_of(int(sheet.specimen), seed=SEED)
    with pytest.raises(ValueError, match="specimen 3 has sheets 0 to"):
        draw_sheet(3, 9, seed=SEED)


def test_classes_are_uneven() -> None:
    stained = np.mean([label_of(number, seed=SEED) for number in range(2000)])
    assert 0.38 < stained < 0.46


def test_sheets_come_at_the_height_asked_for() -> None:
    with Image.open(io.BytesIO(draw_sheet(0, 0, seed=SEED, height=256).jpeg)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (192, 256))


def test_mean_colour_alone_does_not_tell_the_classes_apart() -> None:
    """The check that the classifier is not handed the answer: a logistic regression on mean
    colour stays near the majority class."""
    sheets = list(draw_specimens(range(300), seed=SEED))
    pixels, _ = decode_all(sheets, height=32)
    labels = np.array([sheet.label for sheet in sheets])
    colours, cut = mean_colours(pixels), len(labels) // 2
    found = metrics.fit_colour_baseline(colours[:cut], labels[:cut].tolist())
    counts = metrics.confusion(labels[cut:], found.predict(colours[cut:]))
    assert metrics.accuracy(counts) < metrics.majority(counts) + 0.08


def test_the_colour_baseline_does_learn_what_colour_tells() -> None:
    labels = np.arange(200) % 2
    colours = np.full((200, 3), 120.0) + 30 * labels[:, None]
    colours += np.random.default_rng(1).normal(0, 8, colours.shape)
    found = metrics.fit_colour_baseline(colours, labels.tolist())
    assert metrics.accuracy(metrics.confusion(labels, found.predict(colours))) > 0.95


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_any_colour_mode_becomes_rgb_at_the_height_asked_for(mode: str) -> None:
    assert decode(jpeg(200, mode=mode), height=32).shape == (32, 24, 3)


def test_scaled_decoding_agrees_with_averaging_the_whole_image() -> None:
    whole = draw_sheet(5, 0, seed=SEED).jpeg
    with Image.open(io.BytesIO(whole)) as image:
        slow = np.asarray(image.convert("RGB").resize((24, 32), Image.Resampling.BOX), np.int16)
    assert np.abs(decode(whole, height=32).astype(np.int16) - slow).mean() < 3


@pytest.mark.parametrize("harm", [lambda b: b[:900], lambda b: b"GIF89a", lambda b: b""])
def test_an_image_in_part_or_none_at_all_is_unreadable(harm) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Unreadable):
        decode(harm(jpeg(200)), height=32)


def test_measures_on_counts_worked_out_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    predicted = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 0])
    counts = metrics.confusion(labels, predicted)
    assert counts.tolist() == [[5, 1], [1, 3]]
    assert metrics.accuracy(counts) == pytest.approx(0.8)
    assert metrics.majority(counts) == pytest.approx(0.6)
    # chance agrees on 0.6·0.6 + 0.4·0.4 = 0.52
    assert metrics.quadratic_kappa(counts) == pytest.approx((0.8 - 0.52) / (1 - 0.52))


def test_kappa_weighs_far_mistakes_more_and_is_0_for_the_majority_class() -> None:
    near, far = np.diag([5, 5, 5]), np.diag([5, 5, 5])
    near[0, 1], far[0, 2] = 3, 3
    assert 1 > metrics.quadratic_kappa(near) > metrics.quadratic_kappa(far)
    assert metrics.quadratic_kappa(np.array([[7, 0], [3, 0]])) == pytest.approx(0)
    assert metrics.quadratic_kappa(np.array([[7, 0], [0, 0]])) == 0


def test_no_specimen_is_in_both_sides_of_a_split() -> None:
    split = split_drawn(train=5, apply=9)
    assert len(split.train) == 5 and len(split.apply) == 9
    assert not set(split.train) & set(split.apply)


def lay_out(folder: Path, rows: list[tuple[str, str, str, bytes | None]]) -> Path:
    """Files and their list, a row each of path, label, specimen and the file's bytes."""
    table = ["path,label,specimen"]
    for path, label, specimen, encoded in rows:
        table.append(f"{path},{label},{specimen}")
        if encoded is not None:
            (folder / path).write_bytes(encoded)
    labels = folder / "labels.csv"
    labels.write_text("\n".join(table) + "\n")
    return labels


def test_a_collection_is_grouped_by_specimen_without_duplicates_and_torn_files(
    tmp_path: Path,
) -> None:
    labels = lay_out(
        tmp_path,
        [
            ("a.jpg", "stained", "K1", jpeg(10)),
            ("b.jpg", "1", "K1", jpeg(60, mode="L")),
            ("c.jpg", "unstained", "K2", jpeg(110)),
            ("again.jpg", "0", "K3", jpeg(110)),
            ("torn.jpg", "0", "K2", jpeg(160)[:700]),
        ],
    )
    found = read_collection(tmp_path, labels, height=32)
    assert found.names == ("K1", "K2")
    assert [(s.specimen, s.sheet, s.label) for s in found.sheets([0, 1])] == [
        ("K1", "a.jpg", 1),
        ("K1", "b.jpg", 1),
        ("K2", "c.jpg", 0),
    ]
    assert found.duplicates == ("again.jpg",)
    assert [path for path, _ in found.unreadable] == ["torn.jpg"]
    split = split_collection(found, train_share=0.5, seed=1)
    assert sorted(split.train + split.apply) == [0, 1]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a.jpg", "1", "K1", jpeg(9)), ("b.jpg", "0", "K2", jpeg(9))], "the same image, in both"),
        ([("a.jpg", "1", "K1", jpeg(9)), ("a.jpg", "0", "K1", jpeg(9))], "a.jpg is in both"),
        ([("a.jpg", "perhaps", "K1", jpeg(9))], "label 'perhaps'; expected 0"),
        ([("gone.jpg", "1", "K1", None)], "gone.jpg: No such file"),
        ([("a.jpg", "1", "", jpeg(9))], "path or specimen is empty"),
    ],
)
def test_a_collection_that_contradicts_itself_is_refused(
    tmp_path: Path, rows: list[tuple[str, str, str, bytes | None]], says: str
) -> None:
    with pytest.raises(BadCollection, match=says):
        read_collection(tmp_path, lay_out(tmp_path, rows), height=32)


def test_a_list_without_its_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,class\na.jpg,1\n")
    with pytest.raises(BadCollection, match="no column label, specimen"):
        read_collection(tmp_path, tmp_path / "labels.csv", height=32)


def test_too_few_specimens_to_split_are_refused(tmp_path: Path) -> None:
    labels = lay_out(tmp_path, [("a.jpg", "1", "K1", jpeg(9))])
    found = read_collection(tmp_path, labels, height=32)
    with pytest.raises(BadCollection, match="1 specimens cannot be split"):
        split_collection(found, train_share=0.5, seed=1)


def device(pci: Path, address: str, *, bars: list[int], vendor: int = 0x10DE) -> None:
    folder = pci / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"0x{vendor:04x}\n")
    (folder / "class").write_text("0x030200\n")
    lines = [
        f"0x{1 << 40:016x} 0x{(1 << 40) + s - 1:016x} 0x0000" if s else "0x0 0x0 0x0" for s in bars
    ]
    (folder / "resource").write_text("\n".join(lines) + "\n")


def test_an_emulated_gpu_is_told_from_a_card_by_its_missing_memory_window(tmp_path: Path) -> None:
    device(tmp_path, "0000:02:00.0", bars=[1 << 24, 0, 128 << 30, 0, 1 << 25, 0])
    device(tmp_path, "0000:01:00.0", bars=[1 << 20, 0, 0, 0, 0, 0])
    device(tmp_path, "0000:03:00.0", bars=[1 << 20, 0, 0, 0, 0, 0], vendor=0x8086)
    assert model.read_gpus(tmp_path) == [("0000:01:00.0", True), ("0000:02:00.0", False)]
    assert model.read_gpus(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (("0",), "cpu (emulated GPU 0000:01:00.0 held)"),
        (("1",), "cpu (GPU 0000:02:00.0 held, but no CUDA device)"),
        (("5",), "cpu (GPU 5 held, but no CUDA device)"),
        ((), "cpu (no GPU held)"),
    ],
)
def test_the_device_is_said_plainly(tmp_path: Path, held: tuple[str, ...], says: str) -> None:
    device(tmp_path, "0000:01:00.0", bars=[1 << 20])
    device(tmp_path, "0000:02:00.0", bars=[1 << 24, 0, 128 << 30])
    assert model.describe_cpu(model.Held(held), pci=tmp_path) == says


def test_a_taller_input_gets_more_convolutions() -> None:
    assert [len(model.widths_for(height)) for height in (32, 64, 128, 256)] == [3, 4, 5, 6]


def test_a_model_is_never_overwritten_and_never_there_in_part(tmp_path: Path) -> None:
    class Network:
        def save(self, file: Path) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            file.write_bytes(b"weights")

        full = False

    network = Network()
    model.save(network, {"schema": 1}, tmp_path / "one")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"model.keras", "model.json"}
    with pytest.raises(FileExistsError):
        model.save(network, {}, tmp_path / "one")
    network.full = True
    with pytest.raises(OSError, match="No space"):
        model.save(network, {}, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_drawn_sheets_are_found_again_by_their_names() -> None:
    source = Drawn(SEED)
    sheet = next(source.sheets([4]))
    assert source.find(sheet.specimen, sheet.sheet) == sheet.jpeg
