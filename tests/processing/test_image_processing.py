"""Images of every mode and from every source become the right pixels; hostile ones are refused in one sentence."""

import base64
import http.server
import io
import json
import re
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ett.processing_ett import ETTImageProcessor, ImageError, image_reading_ett, load_image
from ett.processing_ett.image_reading_ett import read_image_size

RED = (255, 0, 0)


def color_of(image: Image.Image) -> tuple[int, int, int]:
    assert image.mode == "RGB"
    (_, color), *others = image.getcolors()
    assert not others
    return color


@pytest.fixture
def image_processor():
    return ETTImageProcessor(size={"height": 16, "width": 24})


def test_default_size_is_the_papers():
    assert dict(ETTImageProcessor().size) == {"height": 512, "width": 512}


def test_pixels_are_channels_first_in_minus_one_to_one(image_processor):
    image = Image.new("RGB", (24, 16), (255, 0, 51))
    pixels = image_processor(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 16, 24) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_wide_image_is_covered_and_cropped_around_its_centre(image_processor):
    image = Image.new("RGB", (96, 32), "white")
    image.paste("black", (24, 0, 72, 32))  # exactly the centre that survives
    nearest = Image.Resampling.NEAREST  # the others blend in what lies beyond the edge
    assert (image_processor(image, resample=nearest, return_tensors="pt").pixel_values == -1).all()


def test_tall_image_is_cropped_at_top_and_bottom(image_processor):
    image = Image.new("RGB", (24, 48), "white")
    image.paste("black", (0, 16, 24, 32))
    assert (image_processor(image, return_tensors="pt").pixel_values == -1).all()


def test_image_of_the_right_size_survives_the_round_trip_exactly(image_processor):
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    pixels = image_processor(Image.fromarray(values), return_tensors="pt").pixel_values
    (restored,) = image_processor.post_process(pixels)
    np.testing.assert_array_equal(np.asarray(restored), values)


def test_post_process_clamps(image_processor):
    pixels = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)
    assert image_processor.post_process(pixels)[0].getpixel((0, 0)) == (0, 128, 255)


def test_post_process_names_the_shape_it_needs(image_processor):
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\); expected \(num_images, 3, height, width\)"):
        image_processor.post_process(torch.zeros(3, 16, 16))


@pytest.mark.parametrize(
    "array",
    [
        np.full((16, 24, 3), RED, np.uint8),
        torch.tensor(RED, dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 24),
        np.full((16, 24, 3), (1.0, 0.0, 0.0)),
        torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 16, 24),
    ],
    ids=["numpy bytes", "torch bytes", "numpy floats", "torch floats"],
)
def test_arrays_equal_the_image_they_show(image_processor, array):
    expected = image_processor(Image.new("RGB", (24, 16), RED), return_tensors="pt").pixel_values
    assert torch.equal(image_processor(array, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(
    "array",
    [
        np.full((16, 24), 51, np.uint8),
        np.full((16, 24), 0.2),
        torch.full((16, 24), 51, dtype=torch.uint8),
        torch.full((3, 16, 24), 0.2, dtype=torch.bfloat16),
        torch.full((16, 24), 0.2, dtype=torch.bfloat16),
    ],
    ids=["grey", "grey floats", "grey tensor", "bfloat16", "grey bfloat16"],
)
def test_grey_arrays_and_bfloat16_tensors_are_images(image_processor, array):
    expected = image_processor(Image.new("RGB", (24, 16), (51, 51, 51)), return_tensors="pt").pixel_values
    for given in (array, [array]):
        assert torch.equal(image_processor(given, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((16, 24, 3), 2.0), "from 2.0 to 2.0; expected 0 to 1"),
        (np.full((16, 24, 3), np.nan), "from nan to nan"),
        (np.zeros((16, 24, 3), np.int64), "holds int64 values"),
        (np.zeros((0, 24, 3), np.uint8), r"shape \(0, 24, 3\) is no image"),
    ],
)
def test_array_that_is_no_image_is_refused(image_processor, array, message):
    with pytest.raises(ImageError, match=message):
        image_processor(array)


def test_options_that_would_change_the_range_are_refused(image_processor):
    with pytest.raises(TypeError, match="do_rescale"):
        image_processor(Image.new("RGB", (24, 16)), do_rescale=False)


def test_size_may_be_one_number():
    assert ETTImageProcessor(size=32)(Image.new("RGB", (5, 9)))["pixel_values"][0].shape == (3, 32, 32)


NO_SIZES = [0, -8, 8.0, "8", (8,), (8, 8, 8), (8, 0), {"height": 8}, {"shortest_edge": 8}, {"height": 8, "width": 8.5}]


def no_size(size) -> str:
    sentence = f"size is {size!r}; expected a 'height' and a 'width', both in whole pixels and at least 1."
    return f"^{re.escape(sentence)}$"


@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
def test_what_is_no_size_makes_no_image_processor(size):
    with pytest.raises(ValueError, match=no_size(size)):
        ETTImageProcessor(size=size)


@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
def test_what_is_no_size_is_refused_before_an_image_is_opened(image_processor, size):
    with pytest.raises(ValueError, match=no_size(size)):
        image_processor("gone.png", size=size)


@pytest.mark.parametrize("size", [None, *NO_SIZES], ids=repr)
def test_what_is_no_size_is_refused_where_it_was_set(image_processor, size):
    image_processor.size = size
    with pytest.raises(ValueError, match=no_size(size)):
        image_processor("gone.png")


def test_a_size_of_more_pixels_than_an_image_may_have_is_refused(image_processor):
    with pytest.raises(ValueError, match=r"^size is \(10000, 10000\); expected at most 89478485 pixels in all\.$"):
        image_processor(Image.new("RGB", (24, 16)), size=(10_000, 10_000))


def test_settings_survive_saving(tmp_path):
    ETTImageProcessor(size={"height": 8, "width": 16}, max_image_pixels=99).save_pretrained(tmp_path)
    loaded = ETTImageProcessor.from_pretrained(tmp_path)
    assert dict(loaded.size) == {"height": 8, "width": 16} and loaded.max_image_pixels == 99


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 128, (128, 128, 128)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), RED),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I", 65535, (255, 255, 255)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("LAB", (128, 128, 128), (119, 119, 119)),  # L* is 50.
        ("La", (51, 51), (255, 255, 255)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),
    ],
)
def test_every_mode_becomes_rgb_over_white(mode, color, expected):
    assert color_of(load_image(Image.new(mode, (3, 2), color))) == expected


def test_palette_and_its_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, *RED])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png", transparency=0)
    loaded = load_image(tmp_path / "palette.png")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]


def test_sixteen_bit_file_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((2, 3), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert color_of(load_image(tmp_path / "deep.png")) == (100, 100, 100)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(color_type: int, values: list[int], transparent: list[int] | None = None) -> bytes:
    """A PNG of 16 bits a channel and 1 x 1 pixels, which Pillow cannot write for every `color_type`."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, color_type, 0, 0, 0)
    content = chunk(b"IHDR", header)
    if transparent is not None:
        content += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("color_type", "values", "transparent", "expected"),
    [
        (0, [100 * 257], None, (100, 100, 100)),
        (0, [100 * 257], [100 * 257], (255, 255, 255)),
        (0, [100 * 257], [7], (100, 100, 100)),
        (2, [100 * 257, 65535, 0], None, (100, 255, 0)),
        (4, [100 * 257, 65535], None, (100, 100, 100)),
        (4, [0, 0], None, (255, 255, 255)),
        (6, [100 * 257, 0, 0, 65535], None, (100, 0, 0)),
        (6, [0, 0, 0, 0], None, (255, 255, 255)),
    ],
    ids=["grey", "transparent level", "other level", "colour", "grey, opaque", "grey, clear", "opaque", "clear"],
)
def test_sixteen_bits_a_channel_are_scaled_to_eight(color_type, values, transparent, expected):
    assert color_of(load_image(deep_png(color_type, values, transparent))) == expected


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_file_of_floats_is_taken_from_zero_to_one():
    half = Image.fromarray(np.full((2, 3), 0.5, np.float32))
    assert color_of(load_image(saved(half, "TIFF"))) == (128, 128, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.full((2, 2), 300.0, np.float32),
            "the image cannot be used: An image of floats holds values from 300.0 to 300.0; expected 0 to 1",
        ),
        (np.full((2, 2), 70_000, np.int32), "integers holds values from 70000 to 70000; expected 0 to 65535"),
        (np.full((2, 2), -1, np.int32), "integers holds values from -1 to -1"),
    ],
)
def test_file_whose_range_is_unknown_is_refused_and_not_clipped(values, message):
    with pytest.raises(ImageError, match=message):
        load_image(saved(Image.fromarray(values), "TIFF"))


def test_jpeg_for_printing_is_read_in_its_colours():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert color_of(load_image(saved(cmyk, "JPEG", quality=100))) == RED


def test_palette_with_degrees_of_transparency():
    image = Image.new("P", (1, 1))
    image.putpalette([*RED])
    assert color_of(load_image(saved(image, "PNG", transparency=bytes([51])))) == (255, 204, 204)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("white", "black")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert color_of(load_image(content)) == (255, 255, 255)


def test_single_pixel_fills_the_image(image_processor):
    pixels = image_processor(Image.new("RGB", (1, 1), RED), return_tensors="pt").pixel_values
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 24))


def test_size_can_be_another_at_each_call(image_processor):
    image = Image.new("RGB", (50, 40), RED)
    pixels = image_processor(image, size={"height": 48, "width": 32}, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 48, 32)
    assert dict(image_processor.size) == {"height": 16, "width": 24}


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.size == (2, 4) and loaded.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_common_formats_are_read(tmp_path, suffix):
    Image.new("RGB", (16, 16), "white").save(tmp_path / f"image.{suffix}")
    assert color_of(load_image(str(tmp_path / f"image.{suffix}"))) == (255, 255, 255)


def test_format_that_runs_an_external_program_is_not_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "image.eps")
    with pytest.raises(ImageError, match="not an image in a format that is read here"):
        load_image(tmp_path / "image.eps")


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"gone.png' is missing; expected an image file"):
        load_image(tmp_path / "gone.png")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty.png' is empty"):
        load_image(tmp_path / "empty.png")


def test_file_that_is_no_image(tmp_path):
    (tmp_path / "notes.png").write_text("not an image at all")
    with pytest.raises(ImageError, match=r"notes.png' is not an image in a format that is read here \(PNG, JPEG"):
        load_image(tmp_path / "notes.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp"])
def test_every_truncation_is_an_image_error_or_an_image(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in range(1, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        try:
            assert load_image(path).size == (32, 32)
        except ImageError:
            continue


def test_truncated_file_says_so(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"cut.png' is corrupt or truncated"):
        load_image(tmp_path / "cut.png")


def test_too_large_file_is_refused_before_decoding_and_without_a_warning(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="10000 x 10000 is more than max_image_pixels=89478485"):
            load_image(tmp_path / "bomb.png")


def test_bomb_that_pillow_itself_refuses(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="likely decompression bomb; expected at most 89478485 pixels"):
        load_image(tmp_path / "bomb.png")


def test_size_is_read_of_the_header_alone(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "whole.jpg", quality=95)
    content = (tmp_path / "whole.jpg").read_bytes()
    assert read_image_size(content[:700]) == (300, 200)
    with pytest.raises(ImageError, match="corrupt or truncated"):
        load_image(content[:700])


def test_size_of_what_is_too_large_or_no_image_is_refused(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="10000 x 10000 is more than max_image_pixels=89478485"):
        read_image_size(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="is not an image in a format that is read here"):
        read_image_size(b"no image")


def test_limit_can_be_set_on_the_image_processor():
    with pytest.raises(ImageError, match="6 x 4 is more than max_image_pixels=23"):
        ETTImageProcessor(max_image_pixels=23)(Image.new("RGB", (6, 4)))


def test_image_without_pixels():
    with pytest.raises(ImageError, match="no pixels: it is 0 wide and 5 high"):
        load_image(Image.new("RGB", (0, 5)))


def test_paths_and_data_urls_are_opened(image_processor, tmp_path):
    image = Image.new("RGB", (24, 16), RED)
    image.save(tmp_path / "image.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    pixels = image_processor([image, str(tmp_path / "image.png"), tmp_path / "image.png", url])["pixel_values"]
    for other in pixels[1:]:
        np.testing.assert_array_equal(other, pixels[0])


def test_broken_data_url(image_processor):
    with pytest.raises(ImageError, match="not valid base64"):
        image_processor("data:image/png;base64,???")


@pytest.mark.parametrize("source", [None, 5, {"bytes": b""}], ids=repr)
def test_what_is_no_image_is_refused(image_processor, source):
    kind = type(source).__name__
    with pytest.raises(ImageError, match=rf"^Got a value of type {kind}; expected an image, its path or URL\.$"):
        image_processor([source])


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_refused(path):
    with pytest.raises(ImageError, match="The path of the image is empty; give that of an image file, or a URL"):
        load_image(path)


def test_a_path_that_is_too_long_is_named_by_its_beginning():
    message = r"^'x{60}\.\.\.' cannot be opened as an image \(File name too long\)\.$"
    with pytest.raises(ImageError, match=message):
        load_image("x" * 5000)


def test_the_content_of_a_file_is_an_image(image_processor):
    content = saved(Image.new("RGB", (24, 16), RED), "PNG")
    expected = image_processor(Image.new("RGB", (24, 16), RED), return_tensors="pt").pixel_values
    assert torch.equal(image_processor(content, return_tensors="pt").pixel_values, expected)


# URLs


@pytest.fixture
def serve():
    """Starts a server which gives every request to `respond(handler)`, and returns an image's URL there."""
    servers, over = [], threading.Event()

    def start(respond) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                try:
                    respond(self)
                except ConnectionError:
                    pass

            def log_message(self, *args):
                pass

            def send(self, content: bytes = b"", length: int | None = None):
                self.send_response(200)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def hold(self, seconds: float = 60):
                """Keeps the connection open, but not after the test."""
                over.wait(seconds)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/image.png"

    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(url: str, reason: str) -> str:
    sentence = f"'{url}' cannot be fetched ({reason}); check the address, or give the path of a downloaded image."
    return f"^{re.escape(sentence)}$"


def test_an_image_is_fetched_from_its_url_though_the_connection_stays_open(serve):
    content = saved(Image.new("RGB", (24, 16), RED), "PNG")
    url = serve(lambda handler: (handler.send(content, len(content)), handler.hold()))
    assert color_of(load_image(url)) == RED


def test_an_image_is_fetched_whose_length_is_not_said(serve):
    url = serve(lambda handler: handler.send(saved(Image.new("RGB", (24, 16), RED), "PNG")))
    assert color_of(load_image(url)) == RED


def test_a_url_at_a_closed_port(image_processor, free_port):
    url = f"http://127.0.0.1:{free_port}/image.png"
    with pytest.raises(ImageError, match=rf"^'{url}' cannot be fetched \(\[Errno \d+\] Connection refused\); check"):
        image_processor(url)


def test_a_url_that_is_not_found(serve):
    url = serve(lambda handler: handler.send_error(404))
    with pytest.raises(ImageError, match=refusal(url, "HTTP Error 404: Not Found")):
        load_image(url)


def test_a_url_of_a_web_page(serve):
    url = serve(lambda handler: handler.send(b"<html>Please log in</html>"))
    with pytest.raises(ImageError, match=f"^'{re.escape(url)}' is not an image in a format that is read here"):
        load_image(url)


def test_a_url_that_leads_to_a_local_file(serve):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", "file:///etc/passwd")
        handler.end_headers()

    with pytest.raises(ImageError, match="Redirection to url 'file:///etc/passwd' is not allowed"):
        load_image(serve(redirect))


def test_an_image_that_ends_early(serve):
    url = serve(lambda handler: handler.send(b"x" * 10, 1000))
    with pytest.raises(ImageError, match=refusal(url, "IncompleteRead(10 bytes read, 990 more expected)")):
        load_image(url)


def test_a_url_that_announces_more_than_an_image_may_have(serve):
    url = serve(lambda handler: (handler.send(b"x" * 10, 10**13), handler.hold()))
    with pytest.raises(ImageError, match=refusal(url, "it has more than 268435455 bytes")):
        load_image(url)


def test_a_url_that_sends_more_than_an_image_may_have(serve, monkeypatch):
    monkeypatch.setattr(image_reading_ett, "MAX_URL_BYTES", 1000)
    url = serve(lambda handler: (handler.send(b"x" * 1001), handler.hold()))
    with pytest.raises(ImageError, match=refusal(url, "it has more than 1000 bytes")):
        load_image(url)


def test_a_url_that_never_answers(serve, monkeypatch):
    assert 0 < image_reading_ett.URL_SECONDS <= 20
    monkeypatch.setattr(image_reading_ett, "URL_SECONDS", 0.2)
    url = serve(lambda handler: handler.hold())
    start = time.monotonic()
    with pytest.raises(ImageError, match=refusal(url, "timed out")):
        load_image(url)
    assert time.monotonic() - start < 5


def test_a_url_that_sends_byte_after_byte(serve, monkeypatch):
    monkeypatch.setattr(image_reading_ett, "URL_SECONDS", 0.3)

    def drip(handler):
        handler.send()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.hold(0.1)

    url = serve(drip)
    start = time.monotonic()
    with pytest.raises(ImageError, match=refusal(url, "it takes longer than 0.3 seconds")):
        load_image(url)
    assert time.monotonic() - start < 5


# Other shapes


@pytest.fixture
def wide():
    """An image of 64 x 16 pixels (width x height), red at its left end, blue at its right end and green between."""
    image = Image.new("RGB", (64, 16), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 0, 255), (48, 0, 64, 16))
    return image


def levels(image, **options):
    pixels = ETTImageProcessor(size=16)(image, return_tensors="pt", **options)["pixel_values"][0]
    return ((pixels + 1) * 127.5).round().int()


def test_cropping_cuts_the_sides_off_and_is_the_default(wide):
    assert torch.equal(levels(wide), levels(wide, fit="crop"))
    assert levels(wide, fit="crop").flatten(1).unique(dim=1).flatten().tolist() == [0, 255, 0]


def test_padding_keeps_the_whole_image_between_borders(wide):
    padded = levels(wide, fit="pad")
    assert torch.equal(padded[:, :6], torch.full((3, 6, 16), 128)) and torch.equal(padded[:, 10:], padded[:, :6])
    assert padded[:, 8, 1].tolist() == [255, 0, 0] and padded[:, 8, 14].tolist() == [0, 0, 255]
    upright = levels(wide.rotate(90, expand=True), fit="pad")
    assert upright[:, 1, 8].tolist() == [0, 0, 255] and upright[:, 8, 1].tolist() == [128] * 3


def test_stretching_keeps_the_whole_image_in_another_shape(wide):
    stretched = levels(wide, fit="stretch")
    assert stretched[:, 8, 1].tolist() == [255, 0, 0] and stretched[:, 0, 14].tolist() == [0, 0, 255]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_square_and_a_thin_image_are_of_the_size(fit):
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert torch.equal(levels(square, fit=fit), levels(square))
    assert levels(Image.new("RGB", (4000, 1)), fit=fit).shape == (3, 16, 16)


def test_the_way_is_saved_and_folders_without_it_crop(tmp_path):
    ETTImageProcessor(size=16, fit="pad").save_pretrained(tmp_path)
    assert ETTImageProcessor.from_pretrained(tmp_path).fit == "pad"
    path = tmp_path / "preprocessor_config.json"
    content = json.loads(path.read_text())
    assert content.pop("fit") == "pad"
    path.write_text(json.dumps(content))
    assert ETTImageProcessor.from_pretrained(tmp_path).fit == "crop"


def test_an_unknown_way_is_an_error():
    with pytest.raises(ValueError, match="fit is 'squash'; expected one of crop, pad, stretch"):
        levels(Image.new("RGB", (16, 16)), fit="squash")
