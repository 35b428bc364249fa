"""DICOM: numbers as the file means them, slices in order, the size of voxels into what is made of it."""

import numpy as np
import pytest
import tifffile

from llmq import plugin
from llmq.errors import UserError
from llmq.predicting import predict
from llmq.types import Context
from llmq.vision.dicom import is_dicom, read_dicom
from llmq.vision.rasters import read_raster

pydicom = pytest.importorskip("pydicom")


def dicom(path, pixels: np.ndarray, **tags):
    """A computed tomography, one file a slice or one of several frames, written by pydicom."""
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    held = pydicom.Dataset()
    held.file_meta = pydicom.dataset.FileMetaDataset()
    held.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    held.SOPClassUID = held.file_meta.MediaStorageSOPClassUID = CTImageStorage
    held.SOPInstanceUID = held.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    held.Rows, held.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        held.NumberOfFrames = len(pixels)
    held.SamplesPerPixel, held.PhotometricInterpretation = 1, "MONOCHROME2"
    held.BitsAllocated = held.BitsStored = 8 * pixels.dtype.itemsize
    held.HighBit, held.PixelRepresentation = held.BitsStored - 1, int(pixels.dtype.kind == "i")
    held.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(held, name, value)
    held.save_as(path, enforce_file_format=True)
    return path


def numbers(*shape: int, kind: str = "uint16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(kind)


def test_numbers_are_as_the_file_means_them(tmp_path):
    stored = numbers(6, 8)
    plain = read_dicom(dicom(tmp_path / "a", stored)).pixels
    assert (plain.dtype, plain.shape) == (np.uint16, (1, 6, 8))
    assert np.array_equal(plain[0], stored)
    assert is_dicom(tmp_path / "a")
    hounsfield = read_dicom(dicom(tmp_path / "b", stored, RescaleSlope=2, RescaleIntercept=-1024)).pixels
    assert hounsfield.dtype == np.int16
    assert np.array_equal(hounsfield[0], 2 * stored.astype(int) - 1024)
    assert read_dicom(dicom(tmp_path / "c", stored, RescaleSlope=0.5, RescaleIntercept=0)).pixels.dtype == np.float32
    white = read_dicom(dicom(tmp_path / "d", stored.astype("uint8"), PhotometricInterpretation="MONOCHROME1")).pixels
    assert np.array_equal(white[0], 255 - stored)


def test_slices_lie_along_their_normal(tmp_path):
    volume = numbers(4, 8, 40, kind="uint8")
    rows = {"coronal": [1, 0, 0, 0, 0, -1], "sagittal": [0, 1, 0, 0, 0, -1]}
    for name, axis in (("coronal", 1), ("sagittal", 0)):
        (tmp_path / name).mkdir()
        for number, z in enumerate((3, 1, 0, 2)):
            place = [5.0, 5.0, 5.0]
            place[axis] = 0.5 * z if name == "coronal" else -0.5 * z  # the normal of these rows and columns is -x
            its = {"ImagePositionPatient": place, "ImageOrientationPatient": rows[name]}
            dicom(tmp_path / name / f"{number}.dcm", volume[z], **its)
        split = plugin.build({"scan": {"path": tmp_path / name}}, "data").read()
        assert all(np.array_equal(e.image[..., 0], volume[z]) for z, e in enumerate(split.held_out))


def test_slices_lie_by_position_and_voxels_have_a_size(tmp_path):
    volume = numbers(4, 8, 40, kind="uint8")
    (tmp_path / "series").mkdir()
    for name, z in zip("abcd", (3, 1, 0, 2), strict=True):
        place = [0, 0, 0.5 * z]
        dicom(tmp_path / "series" / f"{name}.dcm", volume[z], PixelSpacing=[0.002, 0.002], ImagePositionPatient=place)
    split = plugin.build({"rock": {"path": tmp_path / "series", "scale": 2}}, "data").read()
    assert [np.array_equal(e.high[..., 0], volume[z, :, :30]) for z, e in enumerate(split.train)] == [True] * 4
    assert split.pixel_size == 2
    one = dicom(tmp_path / "v.dcm", volume.astype("uint16"), PixelSpacing=[0.002, 0.003])
    frames = plugin.build({"scan": {"path": one, "window": [0, 255]}}, "data").read()
    assert np.array_equal(frames.held_out[2].image[..., 0], volume[2])
    assert frames.pixel_size is None  # a width and another height


def dataset(**tags):
    held = pydicom.Dataset()
    for name, value in tags.items():
        setattr(held, name, value)
    return held


def test_frames_of_an_enhanced_file_have_numbers_and_places_of_their_own(tmp_path):
    stored, places, slopes = numbers(3, 6, 8), (2.0, 0.0, 1.0), (1, 1, 2)
    frames = [
        dataset(
            PixelValueTransformationSequence=[dataset(RescaleSlope=slope, RescaleIntercept=-1024)],
            PlanePositionSequence=[dataset(ImagePositionPatient=[0, 0, place])],
        )
        for place, slope in zip(places, slopes, strict=True)
    ]
    measures = dataset(PixelSpacing=[0.5, 0.25], SliceThickness=1.0)
    rows = dataset(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared = [dataset(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[rows])]
    about = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": frames}
    scan = read_dicom(dicom(tmp_path / "a.dcm", stored, **about))
    hounsfield = stored.astype(int) * np.array(slopes)[:, None, None] - 1024
    assert np.array_equal(scan.pixels, hounsfield[[1, 2, 0]])
    assert (scan.width, scan.height, scan.depth) == (0.25, 0.5, 1.0)
    frames[0].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 1.0]
    with pytest.raises(UserError, match=r"a\.dcm: two slices lie at 1 mm; keep one series"):
        read_dicom(dicom(tmp_path / "a.dcm", stored, **about))
    about["PerFrameFunctionalGroupsSequence"] = frames[:2]
    with pytest.raises(UserError, match=r"a\.dcm: .* 3 frames, and functional groups of 2"):
        read_dicom(dicom(tmp_path / "a.dcm", stored, **about))


def test_a_table_of_numbers_is_looked_up(tmp_path):
    table = dataset(LUTDescriptor=[200, 0, 16], ModalityLUTType="US")
    table.add_new("LUTData", "US", [3 * i for i in range(200)])
    stored = numbers(6, 8)
    assert np.array_equal(read_dicom(dicom(tmp_path / "a", stored, ModalityLUTSequence=[table])).pixels[0], 3 * stored)


def test_two_series_in_a_folder_are_not_mixed(tmp_path):
    slices = numbers(4, 8, 8, kind="uint8")
    for name, place in zip("abcd", (0, 1, 1, 2), strict=True):
        dicom(tmp_path / f"{name}.dcm", slices[0], ImagePositionPatient=[0, 0, 0.001 * place])
    scan = plugin.build({"scan": {"path": tmp_path}}, "data")
    with pytest.raises(UserError, match=r"two slices lie at 0\.001 mm"):
        scan.read()
    dicom(tmp_path / "c.dcm", slices[0], InstanceNumber=3)
    with pytest.raises(UserError, match=r"c\.dcm: tells no position, and other slices"):
        scan.read()


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "InstanceNumber"])
def test_a_slice_that_lacks_is_no_neighbourhood(tag, tmp_path):
    slices = numbers(4, 8, 8, kind="uint8")

    def place(number: float) -> object:
        return [0, 0, 0.0117 * number] if tag == "ImagePositionPatient" else number

    for number in (1, 2, 3, 5):
        dicom(tmp_path / f"{number}.dcm", slices[0], **{tag: place(number)})
    scan = plugin.build({"scan": {"path": tmp_path}}, "data")
    apart = r"0\.0351 and 0\.0585 mm .* 0\.0117 mm apart" if tag == "ImagePositionPatient" else "3 and 5 .* 1 apart"
    with pytest.raises(UserError, match=rf"slices at {apart}; add what is missing, or keep a part without a gap"):
        scan.read()
    for number in (1, 3):  # every second slice is an even series
        (tmp_path / f"{number}.dcm").unlink()
    for number in (8, 11 if tag == "InstanceNumber" else 11.02):
        dicom(tmp_path / f"{number}.dcm", slices[1], **{tag: place(number)})
    assert len(scan.read().held_out) == 4


def test_frames_that_lack_are_told(tmp_path):
    frames = [dataset(PlanePositionSequence=[dataset(ImagePositionPatient=[0, 0, z])]) for z in (0.0, 1.0, 3.0, 4.0)]
    file = dicom(tmp_path / "a.dcm", numbers(4, 6, 8), PerFrameFunctionalGroupsSequence=frames)
    with pytest.raises(UserError, match=r"a\.dcm: slices at 1 and 3 mm are neighbours, and most are 1 mm apart"):
        read_dicom(file)


@pytest.mark.parametrize(("kind", "deep"), [("uint16", True), ("int16", False)])
def test_what_is_made_of_it_is_a_tiff_with_smaller_voxels_in_its_own_units(kind, deep, tmp_path):
    stored = (2000 + 3 * numbers(3, 16, 16).astype(int)).astype(kind)
    about = {
        "PixelSpacing": [0.04, 0.02],
        "SliceThickness": 0.05,
        "RescaleSlope": 1,
        "RescaleIntercept": 0 if deep else -1000,
    }
    file = dicom(tmp_path / "scan.dcm", stored, **about)
    artifact = plugin.build({"srcnn": {"scale": 2}}, "models").base(Context(seed=0, device="cpu"))
    window = {"window": (1000 if not deep else 2000, 1600 if not deep else 2600)}
    made = predict(artifact, [file], tmp_path / "out", window, Context(seed=0, device="cpu"))
    assert [f.name for f in made.files] == ["scan.tif"]
    pixels = tifffile.imread(made.files[0])
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), kind)
    assert window["window"][0] <= np.median(pixels) <= window["window"][1]  # the window is undone
    voxels = read_raster(made.files[0]).voxels
    per = (1 / 20, 1 / 40) if deep else (10 / 0.02, 10 / 0.04)
    assert voxels["resolution"] == pytest.approx([2 * each for each in per], rel=1e-6)
    sizes = {"PhysicalSizeX": 10, "PhysicalSizeY": 20, "PhysicalSizeZ": 50}
    assert voxels["metadata"].items() >= ({"spacing": 50, "unit": "um"} if deep else sizes).items()
    again = predict(artifact, [file], tmp_path / "again", window, Context(seed=0, device="cpu"))
    assert again.files[0].read_bytes() == made.files[0].read_bytes()


def test_an_npz_keeps_the_size_of_its_voxels(tmp_path):
    np.savez(tmp_path / "v.npz", scan=numbers(2, 8, 8, kind="uint8"), voxel_size=5.0)
    artifact = plugin.build({"srcnn": {"scale": 2}}, "models").base(Context(seed=0, device="cpu"))
    made = predict(artifact, [tmp_path / "v.npz"], tmp_path / "out", {}, Context(seed=0, device="cpu"))
    with np.load(made.files[0]) as archive:
        assert {name: archive[name].shape for name in archive} == {"voxel_size": (), "scan": (2, 16, 16)}
        assert archive["voxel_size"] == 2.5


def test_the_low_volume_of_a_pair_has_larger_voxels_than_the_pair_says(tmp_path):
    low = numbers(2, 8, 8, kind="uint8")
    np.savez(tmp_path / "p.npz", lr=low, hr=np.zeros((6, 24, 24), np.uint8), voxel_size=2.5)
    np.savez(tmp_path / "v.npz", lr=low, voxel_size=2.5)  # alone it is no pair
    artifact = plugin.build({"srcnn": {"scale": 2}}, "models").base(Context(seed=0, device="cpu"))
    for name, width in (("p", 7.5), ("v", 2.5)):
        scan = plugin.build({"scan": {"path": tmp_path / f"{name}.npz"}}, "data").read()
        assert (scan.held_out[0].image.shape[:2], scan.pixel_size) == ((8, 8), width)
        made = predict(artifact, [tmp_path / f"{name}.npz"], tmp_path / name, {}, Context(seed=0, device="cpu"))
        with np.load(made.files[0]) as archive:
            assert archive["voxel_size"] == width / 2


@pytest.mark.parametrize(("kind", "padding"), [("uint16", 7), ("int16", -2000), ("uint16", None)])
def test_pixels_that_stand_for_no_value_are_told_once(kind, padding, tmp_path, capsys):
    stored = numbers(6, 8, kind=kind) + np.array(8, kind)
    stored[0, 0] = -2000 if kind == "int16" else 7
    tags = {} if padding is None else {"PixelPaddingValue": padding}
    for name in "ab":
        read_dicom(dicom(tmp_path / name, stored, **tags))
    told = [line for line in capsys.readouterr().err.splitlines() if "PixelPaddingValue" in line]
    assert len(told) == (padding is not None)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", extratags=[(42113, 2, 2, "7", True)])
    read_raster(tmp_path / "a.tif")
    assert ("7 (GDAL_NODATA)" in capsys.readouterr().err) == (kind == "uint16")
    for value in ("n/a", "nan", "-9999"):  # none that these numbers have
        tag = (42113, 2, len(value) + 1, value, True)
        tifffile.imwrite(tmp_path / "b.tif", np.zeros((4, 5), np.uint8), photometric="minisblack", extratags=[tag])
        assert read_raster(tmp_path / "b.tif").pixels.shape == (1, 4, 5)
    assert "GDAL_NODATA" not in capsys.readouterr().err


def test_bad_files_are_named(tmp_path, monkeypatch):
    file = dicom(tmp_path / "a.dcm", numbers(6, 8))
    whole = file.read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cut.dcm: not a readable DICOM file: "):
        read_dicom(tmp_path / "cut.dcm")
    with pytest.raises(UserError, match=r"a.dcm: it is uint16\(1, 6, 8\); .*set window"):
        plugin.build({"scan": {"path": file}}, "data").read()
    with pytest.raises(UserError, match=r"more.dcm: not a readable DICOM file: "):
        read_dicom(dicom(tmp_path / "more.dcm", numbers(6, 8), Rows=4))
    colour = dicom(tmp_path / "c.dcm", numbers(6, 24, kind="uint8"), Columns=8, SamplesPerPixel=3)
    palette = dicom(tmp_path / "p.dcm", numbers(6, 8), PhotometricInterpretation="PALETTE COLOR")
    for coloured in (colour, palette):
        with pytest.raises(UserError, match="is in colour, and grey is needed"):
            read_dicom(coloured)
    monkeypatch.setattr("llmq.vision.dicom.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a.dcm: is DICOM; pip install 'llmq-suite\[dicom\]'"):
        read_dicom(file)
