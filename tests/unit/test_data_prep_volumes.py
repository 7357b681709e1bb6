"""Case files: what is written is read, what is damaged is refused in one line, and downsampling has known answers."""

import os

import h5py
import numpy as np
import pytest

from data_prep import DataError, volumes


def case(shape=(6, 5, 4), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32), rng.integers(0, 2, size=shape).astype(np.uint8)


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL4MIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "lzf"}, {"chunks": (2, 2, 2)}])
def test_any_compression_is_read(tmp_path, options):
    image, label = case()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=image, **options)
        file.create_dataset("label", data=label, **options)
    found = volumes.read_image(tmp_path / "a.h5")
    assert found.dtype == np.float32 and np.array_equal(found, image[None])
    found = volumes.read_label(tmp_path / "a.h5", 2)
    assert found.dtype == np.uint8 and np.array_equal(found, label)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5)])
def test_written_is_read(tmp_path, shape):
    image, label = case(shape)
    volumes.write_case(tmp_path / "new" / "a.h5", image[None], label)
    assert np.array_equal(volumes.read_image(tmp_path / "new" / "a.h5", len(shape)), image[None])
    assert np.array_equal(volumes.read_label(tmp_path / "new" / "a.h5", 2, len(shape)), label)
    assert os.listdir(tmp_path / "new") == ["a.h5"]


def test_several_channels_keep_their_axis(tmp_path):
    image, label = case()
    image = np.stack([image, -image])
    volumes.write_case(tmp_path / "a.h5", image, label)
    assert np.array_equal(volumes.read_image(tmp_path / "a.h5"), image)
    assert np.array_equal(volumes.read_label(tmp_path / "a.h5", 2), label)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    image, label = case()
    volumes.write_case(tmp_path / "a.h5", image, label)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(volumes.os, "replace", fail)
    with pytest.raises(DataError, match="disk full"):
        volumes.write_case(tmp_path / "a.h5", image + 1, label)
    assert os.listdir(tmp_path) == ["a.h5"]
    assert np.array_equal(volumes.read_image(tmp_path / "a.h5")[0], image)


def test_a_full_disk_is_one_line(tmp_path):
    """The size of files is limited here, which is met as a full disk is: at some write, or when the file is closed."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    image, label = case((40, 40, 40))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (100, 3000, 200_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(DataError, match="cannot be written") as error:
                volumes.write_case(tmp_path / "a.h5", image, label)
            check_line(error, tmp_path / "a.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not any(tmp_path.iterdir())


def test_writing_refuses_what_does_not_fit(tmp_path):
    image, label = case()
    with pytest.raises(DataError, match=r"shape \(6, 5, 3\)"):
        volumes.write_case(tmp_path / "a.h5", image, label[..., :3])
    with pytest.raises(DataError, match="values 0 to 300"):
        volumes.write_case(tmp_path / "a.h5", image, label.astype(int) * 300)
    assert not (tmp_path / "a.h5").exists()


def test_an_image_is_read_without_its_label(tmp_path):
    image, label = case()
    write(tmp_path / "a.h5", image=image)
    assert np.array_equal(volumes.read_image(tmp_path / "a.h5")[0], image)
    write(tmp_path / "b.h5", image=image, label=label + 7)
    volumes.read_image(tmp_path / "b.h5")


def bad(array, value):
    array = array.astype(np.float32)
    array[1, 2, 3] = value
    return array


IMAGE, LABEL = case()
BAD_IMAGES = {
    "missing key": ({"label": LABEL}, "no array 'image'.*found: label"),
    "nan": ({"image": bad(IMAGE, np.nan)}, "1 voxels with NaN or infinity"),
    "infinity": ({"image": bad(IMAGE, -np.inf)}, "1 voxels with NaN or infinity"),
    "beyond float32": ({"image": IMAGE.astype(np.float64) * 1e300}, "NaN or infinity"),
    "constant": ({"image": np.full((4, 4, 4), 2.5)}, "is 2.5 everywhere"),
    "axes": ({"image": IMAGE[0]}, r"shape \(5, 4\), expected 3 or 4 axes"),
    "empty": ({"image": IMAGE[:0]}, r"shape \(0, 5, 4\)"),
    "text": ({"image": np.array([[[b"a"]]])}, "expected numbers"),
}
BAD_LABELS = {
    "missing key": ({"image": IMAGE}, "no array 'label'.*found: image"),
    "class": ({"image": IMAGE, "label": LABEL * 2}, "has the value 2, expected 0 to 1"),
    "negative": ({"image": IMAGE, "label": LABEL.astype(int) - 1}, "has the value -1, expected 0 to 1"),
    "fraction": ({"image": IMAGE, "label": bad(LABEL, 0.5)}, "has the value 0.5, expected 0 to 1"),
    "nan": ({"image": IMAGE, "label": bad(LABEL, np.nan)}, "has the value nan"),
    "shape": ({"image": IMAGE, "label": LABEL[:-1]}, r"shape \(5, 5, 4\), expected \(6, 5, 4\)"),
    "axes": ({"image": IMAGE, "label": LABEL[0]}, r"shape \(5, 4\), expected 3 axes"),
}


def check_line(error, path):
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "expected" in str(error.value)


@pytest.mark.parametrize("arrays, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_image_is_refused(tmp_path, arrays, message):
    path = write(tmp_path / "a.h5", **arrays)
    with pytest.raises(DataError, match=message) as error:
        volumes.read_image(path)
    check_line(error, path)


@pytest.mark.parametrize("arrays, message", BAD_LABELS.values(), ids=BAD_LABELS)
def test_a_bad_label_is_refused(tmp_path, arrays, message):
    path = write(tmp_path / "a.h5", **arrays)
    with pytest.raises(DataError, match=message) as error:
        volumes.read_label(path, 2)
    check_line(error, path)


def test_labels_of_other_types_are_read(tmp_path):
    for kind in (bool, np.int64, np.float64):
        path = write(tmp_path / "a.h5", image=IMAGE, label=LABEL.astype(kind))
        found = volumes.read_label(path, 2)
        assert found.dtype == np.uint8 and np.array_equal(found, LABEL)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(DataError, match="no such file") as error:
        volumes.read_image(path)
    check_line(error, path)
    path.write_text("not h5")
    with pytest.raises(DataError, match="not an h5 file") as error:
        volumes.read_image(path)
    check_line(error, path)
    volumes.write_case(path, *case((40, 40, 40)))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match="truncated") as error:
        volumes.read_label(path, 2)
    check_line(error, path)


def test_damaged_compressed_bytes_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    volumes.write_case(path, *case((40, 40, 40)))
    with h5py.File(path) as file:
        chunk = file["image"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with pytest.raises(DataError, match="'image' is damaged") as error:
        volumes.read_image(path)
    check_line(error, path)


def test_damaged_places_in_a_file_are_refused(tmp_path):
    path = write(tmp_path / "a.h5", image=IMAGE)
    content = path.read_bytes()
    start = content.index(b"SNOD")  # the table of what is in the file
    path.write_bytes(content[:start] + b"\0" + content[start + 1 :])
    with pytest.raises(DataError, match="damaged") as error:
        volumes.read_image(path)
    check_line(error, path)


def test_the_classes_of_a_region_are_merged_before_the_majority(tmp_path):
    label = np.array([[[0, 0], [0, 1]], [[2, 1], [3, 2]]], np.uint8)  # 3 of 8 voxels are background, 5 are not
    path = write(tmp_path / "a.h5", label=label)
    assert volumes.read_label(path, 4, region=(1, 3)).tolist() == [[[0, 0], [0, 1]], [[0, 1], [1, 0]]]
    assert volumes.cached_label(path, "X", "a", 2, 4).tolist() == [[[0]]]
    assert volumes.cached_label(path, "X+region", "a", 2, 4, region=(1, 2, 3)).tolist() == [[[1]]]
    with pytest.raises(DataError, match="value 3, expected 0 to 2"):
        volumes.read_label(path, 3, region=(1, 2))


@pytest.mark.parametrize("ones, expected", [(0, 0), (3, 0), (4, 0), (5, 1), (8, 1)])
def test_the_majority_of_a_block_wins_and_a_tie_is_the_lower_class(ones, expected):
    label = np.zeros(8, np.uint8)
    label[:ones] = 1
    block = np.random.default_rng(0).permutation(label).reshape(2, 2, 2)
    assert volumes.downsample_label(block, 2).tolist() == [[[expected]]]


def test_a_plurality_is_enough():
    assert volumes.downsample_label(np.array([[0, 2], [2, 3]], np.uint8), 2).tolist() == [[2]]
    assert volumes.downsample_label(np.array([[3, 2], [2, 3]], np.uint8), 2).tolist() == [[2]]


def test_an_image_block_becomes_its_mean():
    image = np.arange(16, dtype=np.float32).reshape(1, 2, 4, 2)
    found, _ = volumes.downsample(image, np.zeros((2, 4, 2), np.uint8), 2)
    assert found.dtype == np.float32
    assert found.tolist() == [[[[5.5], [9.5]]]]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_downsampling_agrees_with_a_loop(factor):
    rng = np.random.default_rng(factor)
    image = rng.normal(size=(2, 7, 9, 5)).astype(np.float32)
    label = rng.integers(0, 4, size=(7, 9, 5)).astype(np.uint8)
    small, classes = volumes.downsample(image, label, factor)
    assert small.shape == (2, 7 // factor, 9 // factor, 5 // factor) and classes.shape == small.shape[1:]
    assert classes.dtype == np.uint8
    for index in np.ndindex(classes.shape):
        block = tuple(slice(i * factor, (i + 1) * factor) for i in index)
        assert classes[index] == np.bincount(label[block].ravel()).argmax()
        for channel in range(2):
            assert small[channel][index] == pytest.approx(image[channel][block].mean(), abs=1e-6)


def test_odd_trailing_planes_are_dropped():
    label = np.zeros((5, 4), np.uint8)
    label[4] = 1
    image = label[None].astype(np.float32)
    small, classes = volumes.downsample(image, label, 2)
    assert small.shape == (1, 2, 2) and classes.shape == (2, 2)
    assert not small.any() and not classes.any()


@pytest.mark.parametrize("factor", [0, -1, 5])
def test_an_impossible_factor_is_refused(factor):
    with pytest.raises(ValueError, match=f"factor {factor}, expected 1 to 4"):
        volumes.downsample_image(np.zeros((1, 6, 5, 4), np.float32), factor)


def test_the_cache_is_used_and_each_part_is_separate(tmp_path, cache, monkeypatch):
    image, label = case()
    path = write(tmp_path / "a.h5", image=image, label=label)
    first = volumes.cached_image(path, "LA", "a", 2)
    assert np.array_equal(first, volumes.downsample_image(image[None], 2))
    assert os.listdir(cache / "LA-x2") == ["a.image.h5"]
    assert np.array_equal(volumes.cached_label(path, "LA", "a", 2, 2), volumes.downsample_label(label, 2))
    assert sorted(os.listdir(cache / "LA-x2")) == ["a.image.h5", "a.label.h5"]

    def forbidden(*_):
        raise AssertionError("the source was read again")

    monkeypatch.setattr(volumes, "read_image", forbidden)
    monkeypatch.setattr(volumes, "read_label", forbidden)
    assert np.array_equal(volumes.cached_image(path, "LA", "a", 2), first)
    volumes.cached_label(path, "LA", "a", 2, 2)


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_changed_source_is_read_again(tmp_path, change):
    image, label = case()
    path = write(tmp_path / "a.h5", image=image, label=label)
    before = os.stat(path)
    volumes.cached_image(path, "LA", "a", 2)
    if change == "time":
        write(path, image=image + 1, label=label)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert os.stat(path).st_size == before.st_size
    else:
        write(path, image=image + 1, label=label, more=np.zeros(999))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    expected = volumes.downsample_image(image[None] + 1, 2)
    assert np.array_equal(volumes.cached_image(path, "LA", "a", 2), expected)


def test_a_damaged_cache_file_is_redone(tmp_path, cache):
    image, label = case()
    path = write(tmp_path / "a.h5", image=image, label=label)
    expected = volumes.cached_image(path, "LA", "a", 2)
    (cache / "LA-x2" / "a.image.h5").write_text("damaged")
    assert np.array_equal(volumes.cached_image(path, "LA", "a", 2), expected)


def test_the_cache_does_not_hide_a_missing_source(tmp_path):
    path = write(tmp_path / "a.h5", image=IMAGE, label=LABEL)
    volumes.cached_image(path, "LA", "a", 2)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        volumes.cached_image(path, "LA", "a", 2)


def test_the_place_of_the_cache(tmp_path, monkeypatch):
    assert volumes.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("SSL4MIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert volumes.cache_root() == tmp_path / "xdg" / "ssl4mis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert volumes.cache_root() == tmp_path / ".cache" / "ssl4mis"


def test_a_cache_that_cannot_be_written_says_so(tmp_path, cache):
    path = write(tmp_path / "a.h5", image=IMAGE, label=LABEL)
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written.*SSL4MIS_CACHE") as error:
        volumes.cached_image(path, "LA", "a", 2)
    assert "\n" not in str(error.value)
