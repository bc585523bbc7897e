"""A user's own rewards (a function in a file, a server, a sum), and the size of a JPEG."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from nabla_gfn_jax import rewards
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.rewards import NAMES, REWARDS, RewardNames, jpeg, load_reward, remote, terms
from nabla_gfn_jax.rewards.reward import Reward
from nabla_gfn_jax.settings import Settings

FILE = """
import jax.numpy as jnp
import numpy as np
from nabla_gfn_jax.rewards import Reward

def bright(images):
    return images.mean(axis=(1, 2, 3))

def length(images, prompts):
    assert type(images) is np.ndarray
    return [len(prompt) + image.max() for image, prompt in zip(images, prompts)]

def full():
    return Reward({"w": jnp.float32(2)}, lambda prompts: {}, lambda p, images, f: p["w"] * images[:, 0, 0, 0])

def twice(images):
    return np.asarray(images).mean(axis=(1, 2, 3))

def flat(images):
    return images.mean()

def nothing(images, prompts):
    return [float("nan")] * len(prompts)

def of_three(a, b, c):
    return 0

number = 3
"""
IMAGES = np.random.default_rng(0).uniform(size=(3, 64, 64, 3)).astype(np.float32)
PROMPTS = ["a cat", "a dog and a cow", ""]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def scores(reward, images=IMAGES, prompts=PROMPTS):
    return jax.jit(reward.scores)(reward.params, images, reward.encode_prompts(list(prompts)))


def test_a_function_in_jax(file):
    reward = load_reward(f"{file}:bright")
    np.testing.assert_allclose(scores(reward)["log_reward"], IMAGES.mean((1, 2, 3)), rtol=1e-5)
    gradient = jax.grad(lambda images: reward.score({}, images, {}).sum())(jnp.asarray(IMAGES))
    np.testing.assert_allclose(gradient, np.full_like(IMAGES, 1 / (64 * 64 * 3)), rtol=1e-5)
    assert reward.files == (file,)  # a changed file is another reward to a run


def test_a_function_in_numpy_for_algorithms_without_its_gradient(file):
    reward = load_reward(f"{file}:length")
    found = scores(reward)["log_reward"]
    np.testing.assert_allclose(found, [len(p) + i.max() for p, i in zip(PROMPTS, IMAGES, strict=True)], rtol=1e-5)
    again = scores(reward, IMAGES[:1], ["another"])["log_reward"]  # other prompts, beside the first
    np.testing.assert_allclose(again, [7 + IMAGES[0].max()], rtol=1e-5)
    with pytest.raises(UserError, match=r"mine\.py:length is computed outside of JAX .* that needs none, such as ddpo"):
        jax.grad(lambda images: reward.score({}, images, jnp.arange(3, dtype=jnp.int32)).sum())(jnp.asarray(IMAGES))


def test_a_whole_reward(file):
    reward = load_reward(f"{file}:full")
    np.testing.assert_allclose(scores(reward)["log_reward"], 2 * IMAGES[:, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("twice", r"mine\.py:twice cannot be compiled \(Tracer\w+: .* write it with jax\.numpy, or take \(images, pr"),
        ("flat", r"mine\.py:flat gives \(\) for images of shape \(2, 64, 64, 3\); it must give \(2,\)"),
        ("of_three", "takes 3 arguments; a reward is one of"),
        ("number", "is not a function"),
        ("missing", "has nothing called missing"),
    ],
)
def test_functions_that_are_none(file, name, said):
    with pytest.raises(UserError, match=said) as caught:
        load_reward(f"{file}:{name}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_run(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"bad\.py:f: the file cannot be run \(ModuleNotFoundError: No module named"):
        load_reward(f"{tmp_path}/bad.py:f")
    with pytest.raises(UserError, match=r"there is no file .*none\.py"):
        load_settings(Settings, "emoji", {"reward": f"{tmp_path}/none.py:f"})


def test_an_error_of_a_callback_is_one_line(file, capsys):
    reward = load_reward(f"{file}:nothing")

    @exit_on_user_error
    def main(argv):
        jax.block_until_ready(scores(reward))

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"error: {file}:nothing must give a finite number for each of 3 images; it gave [nan, nan")


def test_a_sum(file):
    """A sum is log R = Σ w log R of its parts, which are also reported separately."""
    reward = load_reward(f"{file}:bright:2+jpeg:-0.5+{file}:full")
    assert [(t.label, t.weight) for t in terms(f"{file}:bright:2+jpeg:-0.5")] == [("bright", 2.0), ("jpeg", -0.5)]
    found = scores(reward)
    bright, size = IMAGES.mean((1, 2, 3)), jpeg.minus_kilobytes(IMAGES, PROMPTS)
    expected = {"bright": bright, "jpeg": size, "full": 2 * IMAGES[:, 0, 0, 0]}
    for name, values in expected.items():
        np.testing.assert_allclose(found[f"log_reward_{name}"], values, rtol=1e-5)
    total = 2 * bright - 0.5 * size + expected["full"]
    np.testing.assert_allclose(found["log_reward"], total, rtol=1e-5)
    assert reward.files == (file,)
    metric = LogReward(reward)
    metric.prepare(PROMPTS)
    state = metric.update(Batch(IMAGES, np.arange(3)))
    figures = metric.compute(state)
    assert figures["log_reward"].value == pytest.approx(total.mean(), rel=1e-5)
    assert figures["log_reward_jpeg"].value == pytest.approx(size.mean(), rel=1e-5)


def test_one_weighted_reward_has_a_gradient(file):
    reward = load_reward(f"{file}:bright:-3")
    gradient = jax.grad(lambda x: reward.score(reward.params, x, {"bright": {}}).sum())(jnp.asarray(IMAGES))
    np.testing.assert_allclose(gradient, np.full_like(IMAGES, -3 / (64 * 64 * 3)), rtol=1e-5)


def test_names():
    for name in ("valence", "valence:2", "valence:0.5+jpeg", "valence + jpeg:-1e-2", "http://localhost:8000/score:2"):
        assert name in NAMES, name
    for name in (
        "",
        "beauty",
        "valence:",
        "valence:much",
        "valence+",
        "valence:nan",
        "+",
        "none",
        "my.py",
        "my.py:a b",
    ):
        assert name not in NAMES, name
    assert "none" in RewardNames("none")
    with pytest.raises(UserError, match="names one reward twice"):
        load_reward("jpeg:1+jpeg:2")
    with pytest.raises(UserError, match="there is no reward 'beauty'; choose one of valence"):
        load_reward("beauty")
    assert set(REWARDS) < set(NAMES)


def test_jpeg():
    """Noise makes a larger file than one colour, and the gradient is refused."""
    plain, noise = jpeg.minus_kilobytes(np.stack([np.full((64, 64, 3), 0.5, np.float32), IMAGES[0]]), ["", ""])
    file = io.BytesIO()
    Image.fromarray(np.round(IMAGES[0] * 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    assert noise == pytest.approx(-len(file.getvalue()) / 1000)
    assert noise < plain < 0


class Server(BaseHTTPRequestHandler):
    """Scores an image by its mean level and the length of its prompt; fails a given number of times."""

    failures, answer = 0, None

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Server.failures:
            Server.failures -= 1
            self.send_error(503)
            return
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in given["images"]]
        found = [float(np.asarray(p).mean()) + len(t) for p, t in zip(pictures, given["prompts"], strict=True)]
        body = Server.answer or json.dumps({"scores": found}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setattr(Server, "failures", 0)
    monkeypatch.setattr(Server, "answer", None)
    running = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/score"
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_server(server):
    """The server gets PNGs and returns numbers; a request is sent up to three times."""
    reward = load_reward(server)
    expected = [np.round(i * 255).mean() + len(p) for i, p in zip(IMAGES, PROMPTS, strict=True)]
    Server.failures = 2
    np.testing.assert_allclose(scores(reward)["log_reward"], expected, rtol=1e-5)
    Server.failures = 3
    with pytest.raises(UserError, match=rf"the reward at {server} does not answer \(.*503.*\); start its server"):
        remote.ask(server, IMAGES, PROMPTS)
    Server.answer = b'{"scores": [1]}'
    with pytest.raises(UserError, match=r"answers b'\{\"scores\": \[1\]\}'; it must be .* for each of 3 images"):
        remote.ask(server, IMAGES, PROMPTS)


def test_a_server_that_is_down(monkeypatch):
    with pytest.raises(UserError, match=r"the reward at http://127\.0\.0\.1:9/x does not answer \(.*refused"):
        load_reward("http://127.0.0.1:9/x")


def test_all_of_it_is_a_reward():
    assert isinstance(rewards.REWARDS["jpeg"](), Reward)
