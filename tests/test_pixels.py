"""Pixels as their files describe them. Written by tifffile, Pillow, scipy or by hand; arrays are the oracle."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_image_data import classes_in, read, save
from test_rock import volume

from llmq.errors import LlmqError, UserError
from llmq.vision import pixels
from llmq.vision.images import numbers_of, read_image
from llmq.vision.rasters import read_raster
from llmq.vision.volumes import Reading, read_volumes

DEEP = np.random.default_rng(0).integers(0, 65536, (12, 8, 40)).astype(np.uint16)
WINDOW = (1000.0, 51000.0)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def in_window(values, low=WINDOW[0], high=WINDOW[1]):
    """The definition: low becomes 0, high 255, halves up."""
    return np.floor(np.clip((values.astype(float) - low) / (high - low) * 255, 0, 255) + 0.5).astype(np.uint8)


def one_page(path, stack, cut=0):
    """A stack as ImageJ writes it above 4 GB: one page, all slices behind it, their number in the description."""
    about = f"ImageJ=1.53t\nimages={len(stack)}\nslices={len(stack)}\nloop=false\n"
    big = stack.astype(stack.dtype.newbyteorder(">"))
    tifffile.imwrite(path, big[0], byteorder=">", description=about, metadata=None)
    with tifffile.TiffFile(path) as file:
        begin = file.pages[0].dataoffsets[0]
        assert len(file.pages) == 1
    whole = path.read_bytes()[:begin] + big.tobytes()
    path.write_bytes(whole[: len(whole) - cut])
    return path


def rock(path, **settings):
    return read("rock", path=str(path), scale=2, **settings)


def test_a_stack_of_one_page_has_all_its_slices(tmp_path):
    split = rock(one_page(tmp_path / "big.TIF", DEEP), window=WINDOW)
    assert len(split.train) == 12, "and upper case is a volume, no folder of DRSRD1"
    for number in range(12):
        assert np.array_equal(split.train[number].high[..., 0], in_window(DEEP[number, :, :30]))


def test_a_stack_of_one_page_that_is_cut_short_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"big\.tif: not a readable image: .*; copy it again"):
        rock(one_page(tmp_path / "big.tif", DEEP, cut=3), window=WINDOW)


@pytest.mark.parametrize("name", ["v.ome.tif", "v.tif", "ij.tif"])
def test_stacks_by_their_descriptions(tmp_path, name):
    how = {"v.ome.tif": {"metadata": {"axes": "ZYX"}}, "ij.tif": {"imagej": True, "metadata": {"axes": "ZYX"}}}
    tifffile.imwrite(tmp_path / name, DEEP, photometric="minisblack", **how.get(name, {}))
    made, in_colour = pixels.read_tiff(tmp_path / name)
    assert np.array_equal(made, DEEP)
    assert made.dtype == np.uint16
    assert not in_colour


def test_signed_bytes_and_floats_need_a_window_and_go_through_it(tmp_path):
    signed = np.random.default_rng(1).integers(-128, 128, (4, 8, 40)).astype(np.int8)
    signed[0, 0, :2] = -128, 127
    floats = np.linspace(-0.5, 1.5, 4 * 8 * 40, dtype=np.float32).reshape(4, 8, 40)
    for name, values, window in (("s.tif", signed, (-128, 127)), ("f.tif", floats, (0.0, 1.0))):
        tifffile.imwrite(tmp_path / name, values, photometric="minisblack")
        with pytest.raises(UserError, match=rf"{name}: slice 0 is .*{values.dtype}.*{values.min()} to .*set window:"):
            rock(tmp_path / name)
        split = rock(tmp_path / name, window=window)
        assert np.array_equal(split.train[1].high[..., 0], in_window(values[1, :, :30], *window))
    assert rock(tmp_path / "s.tif", window=(-128, 127)).train[0].high[0, :2, 0].tolist() == [0, 255]


def test_a_float_that_is_not_finite_is_refused(tmp_path):
    values = np.zeros((2, 8, 40), np.float32)
    values[1, 2, 3] = np.nan
    tifffile.imwrite(tmp_path / "f.tif", values, photometric="minisblack")
    with pytest.raises(UserError, match=r"f\.tif: holds numbers that are not finite"):
        rock(tmp_path / "f.tif", window=(0, 1))


def test_white_is_zero_is_turned_round(tmp_path):
    grey = volume(3, 4, 8, 40)
    tifffile.imwrite(tmp_path / "w.tif", grey, photometric="miniswhite")
    assert np.array_equal(pixels.read_tiff(tmp_path / "w.tif")[0], 255 - grey)
    tifffile.imwrite(tmp_path / "one.tif", grey[0], photometric="miniswhite")
    assert np.array_equal(read_image(tmp_path / "one.tif", 1)[..., 0], 255 - grey[0])


@pytest.mark.parametrize("planar", ["separate", "contig"])
def test_sixteen_bit_colour_in_planes_or_pixels(tmp_path, planar):
    colour = np.random.default_rng(2).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    stored = np.moveaxis(colour, -1, 0).copy() if planar == "separate" else colour
    tifffile.imwrite(tmp_path / "c.tif", stored, photometric="rgb", planarconfig=planar)
    assert np.array_equal(read_image(tmp_path / "c.tif", 3, WINDOW), in_window(colour))
    with pytest.raises(UserError, match=r"c\.tif: uint16, \d+ to \d+, holds more than 8 bits .* window: \[low, high\]"):
        read_image(tmp_path / "c.tif")


def test_what_tifffile_cannot_unpack_is_unpacked_by_pillow(tmp_path):
    image = volume(5, 9, 7)
    for name, how in (("lzw", "tiff_lzw"), ("packed", "tiff_adobe_deflate"), ("bits", "packbits")):
        Image.fromarray(image).save(tmp_path / f"{name}.tif", compression=how)
        assert np.array_equal(read_image(tmp_path / f"{name}.tif", 1)[..., 0], image)
    Image.fromarray(image > 99).save(tmp_path / "fax.tif", compression="group4")
    assert np.array_equal(read_image(tmp_path / "fax.tif", 1)[..., 0], (image > 99) * np.uint8(255))
    Image.fromarray(image).convert("P").save(tmp_path / "palette.tif")
    assert np.array_equal(read_image(tmp_path / "palette.tif"), np.repeat(image[..., None], 3, -1))


def test_alpha_is_left_away_and_more_samples_are_refused(tmp_path):
    colour = volume(6, 9, 7, 4)
    Image.fromarray(colour).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), colour[..., :3])
    tifffile.imwrite(tmp_path / "m.tif", volume(7, 9, 7, 6), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UserError, match=r"m\.tif: (has 6 samples a pixel|its slices lie|holds)"):
        read_image(tmp_path / "m.tif")


def test_several_images_in_one_file_are_not_taken_for_the_first(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", volume(8, 12, 8, 9), photometric="minisblack")
    with pytest.raises(UserError, match=r"s\.tif: holds 12 images, and one is needed"):
        read_image(tmp_path / "s.tif")
    tifffile.imwrite(tmp_path / "c.tif", volume(8, 2, 3, 8, 9), imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(UserError, match=r"c\.tif: its slices lie along Z and C"):
        rock(tmp_path / "c.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "lzw.tif"])
def test_every_image_is_turned_as_it_is_shown(tmp_path, suffix, orientation):
    """Against Pillow's own transpositions; on a picture of four corners that JPEG keeps."""
    image = np.zeros((32, 48), np.uint8)
    image[:16, :16], image[16:, 32:], image[:16, 32:] = 255, 160, 80
    picture = Image.fromarray(image)
    shown = np.asarray(picture.transpose(TURNS[orientation]) if orientation > 1 else picture)
    path = tmp_path / f"a.{suffix}"
    if "tif" in suffix:
        packed = {"compression": "tiff_lzw"} if "lzw" in suffix else {}
        picture.save(path, tiffinfo={274: orientation}, **packed)
    else:
        exif = picture.getexif()
        exif[274] = orientation
        picture.save(path, exif=exif, quality=95)
    made = read_image(path, 1)[..., 0]
    assert made.shape == shown.shape
    assert abs(made.astype(int) - shown).mean() < 3


@pytest.mark.parametrize("kind", ["plain", "packed", "lzw", "stack"])
def test_a_tiff_cut_at_any_byte_is_one_line_or_whole(tmp_path, kind):
    stack = volume(9, 3, 20, 30)
    path = tmp_path / "a.tif"
    if kind == "stack":
        tifffile.imwrite(path, stack, photometric="minisblack")
    else:
        how = {"packed": "tiff_adobe_deflate", "lzw": "tiff_lzw"}.get(kind)
        frames = [Image.fromarray(s) for s in stack]
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"compression": how} if how else {}))
    whole = path.read_bytes()
    refused = []
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(pixels.read_tiff(path)[0], stack)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) >= 50
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)
    assert logging.getLogger("tifffile").propagate


def test_a_folder_of_slices_is_a_volume_in_the_order_of_their_numbers(tmp_path):
    stack = volume(10, 12, 8, 40)
    for number, image in enumerate(stack):
        Image.fromarray(image).save(tmp_path / f"slice_{number}.TIF")
    (tmp_path / "notes.txt").write_text("of the scan")
    (tmp_path / ".DS_Store").write_text("x")
    split = rock(tmp_path)
    assert [np.array_equal(split.train[i].high[..., 0], stack[i, :, :30]) for i in range(12)] == [True] * 12
    save(tmp_path / "slice_5.TIF", mode="L")
    with pytest.raises(UserError, match=r"slice_5\.TIF: is \(10, 12\), and slice_0\.TIF \(8, 40\)"):
        rock(tmp_path)


def test_masks_of_another_kind_are_no_slices(tmp_path):
    for number in range(2):
        tifffile.imwrite(tmp_path / f"s{number}.tif", DEEP[number].astype(np.uint8))
        Image.fromarray(DEEP[number] > 9).save(tmp_path / f"s{number}_mask.png")
    with pytest.raises(UserError, match=r"holds \.png and \.tif, and the slices of one volume are of one kind"):
        rock(tmp_path)


def test_bare_numbers_need_their_shape_and_kind(tmp_path):
    path = tmp_path / "v.raw"
    DEEP.astype(">u2").tofile(path)
    about = {"shape": [12, 8, 40], "dtype": ">u2", "window": WINDOW}
    assert np.array_equal(rock(path, **about).train[7].high[..., 0], in_window(DEEP[7, :, :30]))
    with pytest.raises(UserError, match=r"v\.raw: bare numbers; say shape: \[z, y, x\] and dtype"):
        rock(path)
    with pytest.raises(UserError, match=r"7680 bytes, and >u2 of shape \[12, 8, 41\] is 7872; correct them"):
        rock(path, **{**about, "shape": [12, 8, 41]})
    with pytest.raises(UserError, match="dtype 'pixels' is no kind of numbers"):
        rock(path, **{**about, "dtype": "pixels"})
    with pytest.raises(UserError, match=r"it is >?u.*; scale it to uint8"):
        rock(path, **{k: v for k, v in about.items() if k != "window"})


def test_netcdf_is_read_or_named(tmp_path):
    from scipy.io import netcdf_file

    with netcdf_file(str(tmp_path / "v.nc"), "w") as file:
        for axis, n in zip("zyx", DEEP.shape, strict=True):
            file.createDimension(axis, n)
        file.createVariable("tomo", "i2", ("z", "y", "x"))[:] = (DEEP // 2).astype(np.int16)
        file.createVariable("x", "f4", ("x",))[:] = np.arange(40)
    assert np.array_equal(rock(tmp_path / "v.nc", window=WINDOW).train[3].high[..., 0], in_window(DEEP[3, :, :30] // 2))
    (tmp_path / "four.nc").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(
        UserError, match=r"four\.nc: (is NetCDF-4 \(HDF5\); pip install h5py, or convert|not a readable)"
    ):
        rock(tmp_path / "four.nc")
    (tmp_path / "broken.nc").write_bytes((tmp_path / "v.nc").read_bytes()[:300])
    with pytest.raises(UserError, match=r"broken\.nc: not a readable NetCDF file"):
        rock(tmp_path / "broken.nc")


def test_packed_and_unsigned_numbers_of_netcdf_are_unpacked(tmp_path):
    """Classic NetCDF has no unsigned numbers and no small floats: attributes say what the stored ones mean."""
    from scipy.io import netcdf_file

    meant = np.random.default_rng(0).integers(0, 256, (3, 4, 5)).astype(np.uint8)
    packed = {"_Unsigned": "true"}, {"scale_factor": 0.5, "add_offset": 10.0}
    for name, stored, kind, about in (("a", meant.view(np.int8), "b", packed[0]), ("b", meant, "h", packed[1])):
        with netcdf_file(str(tmp_path / name), "w") as file:
            for axis, side in zip("zyx", meant.shape, strict=True):
                file.createDimension(axis, side)
            made = file.createVariable("tomo", kind, tuple("zyx"))
            made[:] = stored
            for attribute, value in about.items():
                setattr(made, attribute, value)
        (tmp_path / name).rename(tmp_path / f"{name}.nc")
    assert np.array_equal(read_volumes(tmp_path / "a.nc", None, Reading(), Reading())[0], meant)
    scaled = read_volumes(tmp_path / "b.nc", None, Reading((10.0, 137.5)), Reading())[0]
    assert np.array_equal(scaled, meant)


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        ("h", {"_FillValue": np.int16(7)}),
        ("h", {"missing_value": np.array([3, 7], np.int16), "scale_factor": 0.5}),
        ("h", {"missing_value": 7.0}),
        ("b", {"_FillValue": np.int8(7), "_Unsigned": "true"}),
        ("f", {"_FillValue": np.float32(7)}),
    ],
)
def test_voxels_of_netcdf_without_a_value_are_told(kind, about, tmp_path):
    from scipy.io import netcdf_file

    def written(stored):
        with netcdf_file(str(tmp_path / "v.nc"), "w") as file:
            for axis, side in zip("zyx", stored.shape, strict=True):
                file.createDimension(axis, side)
            made = file.createVariable("tomo", kind, tuple("zyx"))
            made[:] = stored
            for attribute, value in about.items():
                setattr(made, attribute, value)
        return read_volumes(tmp_path / "v.nc", None, Reading((0.0, 255.0)), Reading())[0]

    stored = np.random.default_rng(0).integers(10, 100, (3, 4, 5)).astype(np.float32 if kind == "f" else np.int8)
    assert written(stored).shape == stored.shape  # nothing lacks
    stored[1, 2, 3:] = 7
    with pytest.raises(
        UserError, match=r"v\.nc: 'hr': 2 of 60 voxels are marked as without a value \(_FillValue, missi"
    ):
        written(stored)


def test_floats_of_netcdf_that_were_never_written_are_told(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "v.nc", "w") as file:
        made = file.create_dataset("tomo", (2, 4, 5), "f4", fillvalue=9.969209968386869e36)
        made[0] = 5.0
    with pytest.raises(UserError, match="20 of 40 voxels are marked as without a value"):
        read_volumes(tmp_path / "v.nc", None, Reading((0.0, 255.0)), Reading())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["s01_1", "s01_2", "s01_4"], "slices at 2 and 4 are neighbours, and most are 1 apart; is one missing?"),
        (["s_0", "s_10", "s_20"], ""),
        (["a1_b2", "a2_b7", "a3_b9"], ""),
        (["x", "y", "z9"], ""),
    ],
)
def test_slices_that_lack_by_their_names_are_told(names, said, tmp_path, capsys):
    for name in names:
        Image.fromarray(DEEP[0].astype(np.uint8)).save(tmp_path / f"{name}.png")
    assert len(rock(tmp_path).train) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert bool(said) == bool(told)


def test_sixteen_bit_arrays_go_through_the_window_too(tmp_path):
    np.savez(tmp_path / "v.npz", hr=DEEP)
    assert np.array_equal(rock(tmp_path / "v.npz", window=WINDOW).train[2].high[..., 0], in_window(DEEP[2, :, :30]))
    with pytest.raises(UserError, match="its first number is to be below its second"):
        rock(tmp_path / "v.npz", window=(5, 5))


# Folders of images


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Training", "Testing"), ("TRAIN", "Valid"), ("train", "dev"), ("training", "validation"), ("Train", "eval")],
)
def test_parts_by_any_of_their_names_are_no_classes(tmp_path, train, held_out):
    classes_in(tmp_path / train, "ab", 4)
    save(tmp_path / held_out / "b" / "x.png", 99)
    split = read("image_folder", path=str(tmp_path))
    assert split.classes == ("a", "b")
    assert (len(split.train), [e.name for e in split.held_out]) == (8, [f"{held_out}/b/x.png"])


def test_of_val_and_test_one_is_held_out_and_the_other_counted(tmp_path):
    classes_in(tmp_path / "train", "ab", 4)
    save(tmp_path / "val" / "a" / "v.png", 98)
    save(tmp_path / "test" / "b" / "t.png", 99)
    for settings, name in (({}, "test/b/t.png"), ({"part": "val"}, "val/a/v.png")):
        split = read("image_folder", path=str(tmp_path), **settings)
        assert [e.name for e in split.held_out] == [name]
        assert split.counts["outside_the_parts"] == 1
        assert split.counts["read"] == 10


def test_a_class_may_be_called_train(tmp_path):
    for k, name in enumerate(("bus", "car", "train")):
        for i in range(5):
            save(tmp_path / name / f"{i}.png", 10 * k + i)
    assert read("image_folder", path=str(tmp_path)).classes == ("bus", "car", "train")


def test_parts_that_cannot_be_told_apart_are_refused(tmp_path):
    save(tmp_path / "test" / "a" / "1.png")
    with pytest.raises(UserError, match=r"test: there is no folder to learn from beside it; call one 'train'"):
        read("image_folder", path=str(tmp_path))
    save(tmp_path / "train" / "a" / "1.png", 1)
    save(tmp_path / "more" / "a" / "1.png", 2)
    with pytest.raises(UserError, match=r"more: lies beside 'train', and is no part of the data"):
        read("image_folder", path=str(tmp_path))


def test_links_are_followed_once_and_those_that_lead_nowhere_are_counted(tmp_path):
    outside = classes_in(tmp_path / "outside", "xyz", 3)
    root = classes_in(tmp_path / "d", "a", 2)
    (root / "b").symlink_to(outside / "x")
    (root / "c").mkdir()
    (root / "c" / "more").symlink_to(outside / "y")
    (root / "c" / "one.png").symlink_to(outside / "z" / "0.png")
    (root / "c" / "gone.png").symlink_to(outside / "none.png")
    (root / "c" / "round").symlink_to(root / "c")
    (root / "c" / "up").symlink_to(root.parent)  # or everything above would be data
    save(root / "a" / "2.png", 55)
    split = read("image_folder", path=str(root))
    per_class = np.bincount([e.label for e in (*split.train, *split.held_out)]).tolist()
    # a: 0, 1 and 2; x are a's random images of the same seeds 0 to 2, so two of them stand in two classes.
    assert per_class == [1, 1, 4]
    assert (split.counts["in_two_classes"], split.counts["broken_links"], split.counts["circular_links"]) == (4, 1, 2)


def test_what_systems_leave_is_no_data_and_counted(tmp_path):
    root = classes_in(tmp_path, "ab", 4)
    for place in ("@eaDir", ".ipynb_checkpoints", "__MACOSX", "a/@eaDir", "a/.thumbnails"):
        save(root / place / "t.png", 7)
    for place in (".DS_Store", "a/Thumbs.db", "b/desktop.ini", "b/._0.png"):
        (root / place).write_bytes(b"x")
    split = read("image_folder", path=str(root))
    assert split.classes == ("a", "b")
    assert (len(split.train) + len(split.held_out), split.counts["system_files"]) == (8, 9)


@pytest.mark.parametrize(("n", "held_out"), [(1, 0), (2, 1), (3, 1), (5, 1), (10, 2)])
def test_of_two_images_one_is_held_out(tmp_path, n, held_out):
    split = read("image_folder", path=str(classes_in(tmp_path, "ab", n)))
    assert np.bincount([e.label for e in split.train], minlength=2).tolist() == [n - held_out] * 2
    assert len(split.held_out) == 2 * held_out


def test_an_image_in_two_classes_is_used_in_neither(tmp_path):
    root = classes_in(tmp_path, "ab", 5)
    (root / "b" / "again.png").write_bytes((root / "a" / "0.png").read_bytes())
    split = read("image_folder", path=str(root))
    assert (split.counts["in_two_classes"], split.counts["duplicates"], split.counts["read"]) == (2, 0, 11)
    assert not {"a/0.png", "b/again.png"} & {e.name for e in (*split.train, *split.held_out)}


def test_names_that_are_no_utf_8_are_shown_by_their_bytes(tmp_path):
    root = classes_in(tmp_path, "a", 3)
    name = os.fsdecode(b"caf\xe9")
    try:
        save(root / name / f"{name}.png", 9)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    save(root / name / "2.png", 8)
    split = read("image_folder", path=str(root))
    assert split.classes == ("a", r"caf\xe9")
    assert any(e.name == r"caf\xe9/caf\xe9.png" for e in (*split.train, *split.held_out))
    (root / name / "broken.png").write_text("no image")
    with pytest.raises(UserError) as caught:
        read("image_folder", path=str(root))
    assert r"caf\udce9/broken.png: not a readable image" in str(caught.value)
    str(caught.value).encode("utf-8")


def test_every_error_of_llmq_is_text():
    assert str(LlmqError("of \udce9")) == r"of \udce9"


def test_sixteen_bit_images_in_folders_go_through_a_window(tmp_path):
    for i in range(3):
        tifffile.imwrite(tmp_path / f"{i}.tif", DEEP[i])
        Image.fromarray(DEEP[i + 3]).save(tmp_path / f"{i + 3}.png")
    split = read("image_folder", path=str(tmp_path), channels=1, window=WINDOW)
    found = {e.name: e.image[..., 0] for e in (*split.train, *split.held_out)}
    assert len(found) == 6
    for name, image in found.items():
        assert np.array_equal(image, in_window(DEEP[int(Path(name).stem)]))


@pytest.mark.parametrize("magic", [b"P5", b"P2"])
def test_a_pgm_has_its_own_numbers_and_not_those_that_pillow_makes(magic, tmp_path):
    values = np.arange(16).reshape(4, 4) * 60 + 7
    body = values.astype(">u2").tobytes() if magic == b"P5" else " ".join(map(str, values.ravel())).encode()
    (tmp_path / "a.pgm").write_bytes(magic + b"\n4 4\n1023\n" + body)
    assert np.array_equal(read_image(tmp_path / "a.pgm", 1, (0, 1023))[..., 0], in_window(values, 0, 1023))
    assert np.array_equal(read_raster(tmp_path / "a.pgm").pixels[0], values)
    with pytest.raises(UserError, match="more than 8 bits a pixel"):
        read_image(tmp_path / "a.pgm")
    (tmp_path / "a.ppm").write_bytes(b"P6\n4 4\n1023\n" + np.repeat(values, 3).astype(">u2").tobytes())
    with pytest.raises(UserError, match=r"a\.ppm: RGB up to 1023 holds more than 8 bits"):
        read_image(tmp_path / "a.ppm")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_not_taken_for_its_first_picture(suffix, tmp_path):
    first, second = (Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (50, 200))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    with pytest.raises(UserError, match=rf"a\.{suffix}: holds 2 pictures, and one is needed"):
        read_image(tmp_path / f"a.{suffix}")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])  # as telephones write
    assert abs(int(read_image(tmp_path / "a.jpg")[0, 0, 0]) - 50) < 3
    assert read_raster(tmp_path / "a.jpg").pixels.shape == (1, 8, 8, 3)


def test_a_window_of_deep_files_leaves_bytes_beside_them_alone(tmp_path):
    """Through [0, 65535] all of a picture of bytes would be black: so were low partners of deep volumes."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 40)).astype(np.uint8)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name, 1, (0, 65535))[..., 0], levels)
        assert read_image(tmp_path / name, 1, (0, 100))[..., 0].max() == 255, "a window within bytes counts"
    low = np.random.default_rng(1).integers(0, 256, (12, 4, 20)).astype(np.uint8)
    np.savez(tmp_path / "v.npz", hr=DEEP, lr=low)
    split = rock(tmp_path / "v.npz", window=WINDOW)
    assert np.array_equal(split.train[3].image[..., 0], low[3, :, :15])
    assert np.array_equal(split.train[3].high[..., 0], in_window(DEEP[3, :, :30]))


# Names of classes

NAMES = (
    ("n1", "crane"),
    ("n2", "Cardigan", "Cardigan Welsh corgi"),
    ("n3", "crane"),
    ("n4", "cardigan"),
    ("n5", "goose"),
)


def test_a_name_that_two_outputs_share_is_refused_and_their_keys_are_not():
    assert numbers_of(("n3", "goose"), NAMES) == [2, 4]
    with pytest.raises(
        UserError, match=r"class 'crane' names 2 outputs; call it 'n1' \(output 0\) or 'n3' \(output 2\)"
    ):
        numbers_of(("crane", "goose"), NAMES)
    with pytest.raises(UserError, match=r"class 'cardigan' names 2 outputs; call it 'n2' .* or 'n4'"):
        numbers_of(("goose", "cardigan"), NAMES)
    with pytest.raises(UserError, match="'goose' and 'n5' are both output 4; join them"):
        numbers_of(("goose", "n5"), NAMES)


def test_imagenets_own_doubles_are_refused():
    """By timm's list of its thousand classes: 134 and 517 are cranes, 264 and 474 cardigans, 638 and 639 maillots."""
    from llmq.models.timm_classifier import known_names

    names = known_names(1000)
    for double, outputs in (("crane", (134, 517)), ("cardigan", (264, 474)), ("maillot", (638, 639))):
        with pytest.raises(UserError) as caught:
            numbers_of((double, "goldfish"), names)
        assert all(f"(output {i})" in str(caught.value) for i in outputs)
    assert numbers_of(("n02012849", "n03126707", "goldfish"), names) == [134, 517, 1]


@pytest.mark.parametrize("name", ["v.tif", "v.raw", "v.npz", "v.nc"])
def test_a_pipe_is_no_volume_and_nobody_waits_for_it(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe, and no file"):
        read_volumes(tmp_path / name, None, Reading(None, None, None), Reading(None, None, None))


def test_classes_that_are_called_by_numbers_are_these_outputs():
    """ImageNetV2 calls its folders 0 to 999, and as texts 10 comes before 2."""
    names = [(f"n{i}", f"thing {i}") for i in range(12)]
    classes = sorted(map(str, range(12)))
    assert numbers_of(classes, names) == [int(name) for name in classes]
    assert numbers_of(classes[:-1], names) is None
    assert numbers_of((*classes[:-1], "thing"), names) is None
    assert numbers_of(classes, ()) is None, "where nothing names the outputs, classes are in the order of their names"
