"""Predictions over HTTP are those of the Predictor; what is no request is refused in words, and nothing of it stays."""

import asyncio
import base64
import dataclasses
import io
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests import towers
from tests.serve import malformed, models
from vit_jax.data.host.inputs import read_images
from vit_jax.errors import UserError
from vit_jax.predictor import load
from vit_jax.serve import __main__ as command
from vit_jax.serve.app import make_app
from vit_jax.serve.limits import Limits
from vit_jax.serve.model import Model
from vit_jax.serve.payload import Hold, Refused
from vit_jax.serve.service import Service

LIMITS = Limits(batch=4, max_bytes=400_000, max_pixels=2000)
CUT_OFF = malformed.multipart(('name="image"; filename="a.png"', models.photo(0)), ('name="image"; filename="b.png"', b"b"))[
    :-8
]


@pytest.fixture(scope="module")
def served():
    """(a service, its client)."""
    service = Service(dataclasses.replace(models.classifier(), batch_size=4), LIMITS)
    service.model.compile()
    with TestClient(make_app(service)) as client:
        yield service, client


def turned_photo() -> bytes:
    """A JPEG that is to be turned by a quarter."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(models.photo(9, size=(17, 31)))).save(file, "JPEG", exif=exif)
    return file.getvalue()


def post(client, *images, **fields):
    return client.post("/v1/predict", files=[("image", (f"{i}.png", image)) for i, image in enumerate(images)], data=fields)


def probabilities(result):
    return [x["probability"] for x in sorted(result["predictions"], key=lambda x: x["index"])]


# Answers


def test_probabilities_are_those_of_predict_in_batches_of_any_size(served):
    service, client = served
    kinds = ("PNG", "JPEG", "WEBP", "BMP") * 3
    images = [*(models.photo(i, kind, (12 + i, 30)) for i, kind in enumerate(kinds)), turned_photo()]
    expected = service.model.predictor(read_images(images))["probabilities"]
    for count in (1, 3, len(images)):
        results = post(client, *images[:count], top=5).json()["results"]
        np.testing.assert_allclose([probabilities(x) for x in results], expected[:count], atol=1e-6, rtol=0)
        assert [x["image"] for x in results] == [f"{i}.png" for i in range(count)]
    assert (results[-1]["width"], results[-1]["height"]) == (17, 31)
    encoded = [base64.b64encode(image).decode() for image in images]
    answer = client.post("/v1/predict", json={"images": encoded, "top": 2}).json()["results"]
    assert [x["predictions"] for x in answer] == [x["predictions"][:2] for x in results]
    assert {x["label"] for x in results[0]["predictions"]} == set(models.CLASSES)


def test_a_wrong_address_or_method_names_the_right_one(served):
    _, client = served
    for answer, status in ((client.post("/predict"), 404), (client.get("/v1/predict"), 405)):
        assert answer.status_code == status and "POST /v1/predict takes images" in answer.json()["error"]


def test_clients_at_the_same_time_share_batches_and_get_their_own_answers(served, monkeypatch):
    service, client = served
    compute, sizes = service.model.compute, []

    def slowly(examples):
        time.sleep(0.05)
        sizes.append(len(examples))
        return compute(examples)

    monkeypatch.setattr(service.model, "compute", slowly)
    images = [models.photo(i) for i in range(12)]
    expected = service.model.predictor(read_images(images))["probabilities"]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda image: post(client, image).json()["results"][0], images))
    np.testing.assert_allclose([probabilities(x) for x in answers], expected, atol=1e-6, rtol=0)
    assert max(sizes) > 1 and sum(sizes) == 12
    assert re.search(r'vit_jax_batches_total{size="[24]"} \d', client.get("/metrics").text)


def test_attention_is_that_of_the_predictor_and_says_where_it_lies(served):
    service, client = served
    image = models.photo(3, size=(40, 30))
    result = client.post("/v1/predict", files={"image": ("a.png", image)}, data={"attention": "true"}).json()["results"][0]
    (expected,) = service.model.predictor.attention(read_images(image))
    np.testing.assert_allclose(result["attention"]["map"], expected, rtol=1e-5)
    assert result["attention"]["box"] == [0, 0, 30, 40] and "attention" not in post(client, image).json()["results"][0]
    cropped = dataclasses.replace(service.model.predictor.description, preprocessing={"resize_to": 20})
    model = Model(models.predictor(**vars(cropped)), 1)
    box = model.attention(model.read("a.png", image, 2000))["box"]
    assert box == [3, 12, 27, 28]  # resized to cover 20 x 30, of which the middle 16 x 24 are seen


def test_labels_that_are_typed_are_scored_as_predict_does(tmp_path):
    towers.write(tmp_path, head="sigmoid")
    predictor, labels = load(tmp_path, batch_size=1), ["red cat", "small dog", "the photo"]
    service, images = Service(predictor, Limits(batch=1)), [models.photo(i) for i in range(2)]
    service.model.compile()
    expected = predictor.with_labels(labels)(read_images(images))["probabilities"]
    with TestClient(make_app(service)) as client:
        assert client.get("/v1/model").json()["options"] == {"attention": False, "labels": [], "top": 5}
        results = post(client, *images, labels=labels).json()["results"]
        np.testing.assert_allclose([probabilities(x) for x in results], expected, atol=1e-6, rtol=0)
        assert len(post(client, images[0], labels=labels, top=1).json()["results"][0]["predictions"]) == 1
        assert len(post(client, images[0]).json()["results"][0]["embedding"]) == 8
        wrong = (
            ({"labels": ["a", " a"]}, "more than once"),
            ({"labels": ["a", "b" * 501]}, "500 characters"),
            ({"top": 1}, "option top means nothing"),
        )
        for fields, words in wrong:
            assert words in post(client, images[0], **fields).json()["error"]


def test_a_detector_gives_boxes_above_the_threshold_in_pixels():
    predictor = dataclasses.replace(models.detector(), batch_size=1)
    with TestClient(make_app(Service(predictor, Limits(batch=1)))) as client:
        (result,) = post(client, models.photo(1), threshold=0.2).json()["results"]
        assert client.get("/v1/model").json()["options"] == {"threshold": 0.5}
    pixels = read_images(models.photo(1))
    shown = predictor.show({"threshold": 0.2})({name: x[0] for name, x in predictor(pixels).items()}, pixels[0].shape[:2])
    assert result["objects"] == shown.json["objects"] and len(result["objects"]) > 3


def test_a_segmenter_gives_shares_and_the_class_of_every_pixel():
    predictor = dataclasses.replace(models.segmenter(), batch_size=1)
    service = Service(predictor, Limits(batch=1))
    service.model.compile()
    with TestClient(make_app(service)) as client:
        assert client.get("/v1/model").json()["options"] == {"maps": False}
        (result,) = post(client, models.photo(1), maps=True).json()["results"]
        assert post(client, models.photo(1)).json()["results"][0].keys() == result.keys() - {"maps"}
    pixels = read_images(models.photo(1))
    shown = predictor.show({})({name: x[0] for name, x in predictor(pixels).items()}, pixels[0].shape[:2])
    assert result["areas"] == shown.json["areas"]
    given = Image.open(io.BytesIO(base64.b64decode(result["maps"]["classes"])))
    assert given.mode == "P" and given.size == (30, 20)
    np.testing.assert_array_equal(given, shown.maps["classes"])


def test_the_pages_describe_themselves_and_ask_for_nothing_elsewhere(served):
    _, client = served
    model, document = client.get("/v1/model").json(), client.get("/openapi.json").json()
    assert model["classes"] == 5 and model["image_size"] == [16, 24] and model["options"] == {"top": 5, "attention": False}
    assert set(document["paths"]) == {"/v1/predict", "/v1/model", "/healthz", "/metrics"}
    assert client.get("/healthz").json() == {"status": "ok"}
    for path in ("/", "/docs"):
        page = client.get(path)
        addresses = re.findall(r"(?:https?:)?//[\w.]+", page.text.replace("http://www.w3.org/2000/svg", ""))
        assert set(addresses) <= {"http://testserver"}
        assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "vit_jax_images_total" in client.get("/metrics").text


# Refusals


@pytest.mark.parametrize(
    "status, words, how",
    [
        (400, "image 0.png: the image cannot be decoded", {"files": {"image": ("0.png", b"no image")}}),
        (400, "100 x 30 pixels, allowed are 2,000 in all", {"files": {"image": ("0.png", models.photo(0, size=(30, 100)))}}),
        (400, "there are no images", {"json": {"images": []}}),
        (400, "its last boundary is missing", {"content": CUT_OFF, "headers": malformed.FORM}),
        (400, "is no base64", {"json": {"images": ["/etc/passwd"]}}),
        (400, "is no base64: Only base64 data", {"json": {"images": ["file:///etc/passwd"]}}),
        (400, "unknown option 'tpo': did you mean top?", {"json": {"images": ["AAAA"], "tpo": 1}}),
        (400, "top=0 must be a whole number, at least 1", {"json": {"images": ["AAAA"], "top": 0}}),
        (413, "bytes, allowed are 400,000", {"files": {"image": ("0.png", bytes(500_000))}}),
        (413, "the request has more than 400,000 bytes", {"content": iter([bytes(250_000)] * 2), "headers": malformed.JSON}),
        (413, "the request has 65 images, allowed are 64", {"json": {"images": [""] * 65}}),
        (415, "send multipart/form-data or application/json", {"content": b"x"}),
    ],
)
def test_what_cannot_be_answered_is_said(served, status, words, how):
    response = served[1].post("/v1/predict", **how)
    assert response.status_code == status and words in response.json()["error"]


def test_malformed_requests_are_refused_and_leave_nothing_behind(served):
    service, client = served
    before = threading.active_count()
    for number in range(60):
        headers, body = malformed.request(number)
        response = client.post("/v1/predict", headers=headers, content=body)
        assert response.status_code in (200, 400, 413, 415), (number, response.text)
        assert ("error" in response.json()) == (response.status_code != 200)
    assert len(service.batcher) == 0 and threading.active_count() <= before + os.cpu_count() + 1  # of the pools
    assert post(client, models.photo(1)).status_code == 200


def test_a_full_queue_and_late_answers_have_their_status():
    limits = dataclasses.replace(LIMITS, queue=2, batch=1, timeout=0.3)
    service, gate = Service(models.classifier(), limits), threading.Event()
    service.model.compile()
    compute = service._compute
    service._compute = lambda examples: (gate.wait(5), compute(examples))[1]
    with TestClient(make_app(service)) as client, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda i: post(client, models.photo(i)), range(6)))
        assert sorted({answer.status_code for answer in answers}) == [503, 504]
        assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 503} == {"1"}
        gate.set()
        assert post(client, models.photo(0)).status_code == 200


def test_the_bytes_of_all_requests_are_counted_until_they_are_answered():
    hold = Hold(10, 15)
    with hold.counting() as first, hold.counting() as second:
        first(10)
        for count, arrived, status in ((first, 1, 413), (second, 5, 503)):
            with pytest.raises(Refused) as refused:
                count(arrived)
            assert refused.value.status == status
    with hold.counting() as third:
        third(10)


def test_a_request_that_does_not_arrive_is_given_up():
    app, sent = make_app(Service(models.classifier(), dataclasses.replace(LIMITS, timeout=0.05))), []

    async def run():
        async def receive():
            await asyncio.sleep(1)

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": headers, "query_string": b""}
        await app(scope, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]


def test_a_model_that_gives_no_numbers_is_not_served():
    broken = models.classifier()
    broken.params["head"]["bias"][:] = np.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        Service(broken, LIMITS).model.compile()


def test_what_is_missing_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install starlette uvicorn python-multipart"):
        command.main(["--model=x"])
