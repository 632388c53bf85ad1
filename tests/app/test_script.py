"""The studio driven by a script, with gradio's own client, as README.md in emilie_min/app says."""

import base64
import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

import emilie_min
from emilie_min.app.visitor import data_url
from emilie_min.canvas.photo import open_photo
from emilie_min.insert.insertion import insert
from emilie_min.toy import world

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="not installed: gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_script_opens_edits_looks_undoes_and_is_told_what_is_wrong(shipped):
    import gradio_client
    from pages import served

    photo = world.render(world.scene(3)).resize((96, 96))
    with served(shipped) as page:
        client = gradio_client.Client(page.url, verbose=False)
        names = {"/open", "/key", "/edit", "/where", "/propose", "/insert", "/undo", "/redo", "/go"}
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == names
        told, picture = client.predict(data_url(photo), api_name="/open")
        assert told.startswith("the picture is open") and np.array_equal(opened(picture), photo)
        mask = Image.new("RGBA", (64, 64))
        mask.paste((0, 0, 0, 255), (32, 0, 64, 64))
        told, edited = client.predict("make it night", data_url(mask), steps=4, text_scale=1.1, api_name="/edit")
        assert told.startswith("Edit 1: make it night, where you painted")
        alone = open_photo(photo, shipped)
        for _ in alone.steps([("make it night", alone.at_own_size(mask.getchannel("A")))], steps=4, text_scale=1.1):
            pass
        assert np.array_equal(opened(edited), alone.image)
        told, where = client.predict("remove the square", api_name="/where")
        assert "would act here" in told and opened(where).size == (64, 64)
        assert np.array_equal(opened(client.predict(api_name="/undo")[1]), photo)
        assert client.predict(api_name="/redo")[1] == edited
        assert np.array_equal(opened(client.predict(0, api_name="/go")[1]), photo)
        inset = world.render(world.Scene("sand", "day", (world.Object("star", "pink", "top left"),))).crop(
            (0, 0, 32, 32)
        )
        told, outlined = client.predict(data_url(inset), proposals=3, seed=5, api_name="/propose")
        assert 'shows "a pink star"; 3 places' in told and opened(outlined).size == (192, 192)
        told, drawn = client.predict(take=2, steps=4, seed=5, api_name="/insert")
        assert "in place 2" in told
        alone.undo()
        insert(alone, inset, take=1, steps=4, proposals=3, seed=5)
        assert np.array_equal(opened(drawn), alone.image) and alone.canvas.state.instruction in told
        assert np.array_equal(opened(client.predict(api_name="/undo")[1]), photo)
        other = gradio_client.Client(page.url, verbose=False)
        for call, told in (
            (lambda: client.predict("make it winter", "", api_name="/edit"), "'winter'"),
            (lambda: client.predict(api_name="/undo"), "nothing to undo"),
            (lambda: client.predict("/etc/passwd", api_name="/open"), "data URL"),
            (lambda: client.predict("/etc/passwd", api_name="/propose"), "data URL"),
            (lambda: other.predict(data_url(inset), api_name="/propose"), "open one"),
            (lambda: other.predict(api_name="/insert"), "open one"),
            (lambda: client.predict(api_name="/open"), "did not arrive"),
            (lambda: other.predict("make it night", "", api_name="/edit"), "open one"),
        ):
            with pytest.raises(gradio_client.exceptions.AppError, match=told):
                call()
        (visitor,) = (each for each in page.visitors.values() if each.canvas is not None)
        with visitor.busy, pytest.raises(gradio_client.exceptions.AppError, match="an edit is under way"):
            client.predict(api_name="/undo")


def test_two_scripts_have_pictures_of_their_own(shipped):
    import gradio_client
    from pages import served

    with served(shipped) as page:
        pictures = [world.render(world.scene(seed)) for seed in (3, 4)]
        clients = [gradio_client.Client(page.url, verbose=False) for _ in pictures]
        for client, picture in zip(clients, pictures):
            client.predict(data_url(picture), api_name="/open")
        for client, picture in zip(clients, pictures):
            assert np.array_equal(opened(client.predict(0, api_name="/go")[1]), picture)


def test_a_script_with_a_password_goes_on_with_a_canvas_and_fetches_it(shipped, tmp_path):
    import gradio_client
    from pages import Caller, served

    photo = world.render(world.scene(3)).resize((96, 96))
    alone = open_photo(photo, shipped)
    mask = Image.new("L", (96, 96))
    mask.paste(255, (31, 0, 96, 57))
    for _ in alone.steps([("make it night", mask)], steps=2):
        pass
    alone.canvas.save(tmp_path / "my.canvas")
    with served(shipped, local=False, password="ann:pw") as page:
        headers = {"Authorization": "Basic " + base64.b64encode(b"ann:pw").decode()}
        client = gradio_client.Client(page.url, verbose=False, headers=headers)
        caller = Caller(page, "ann:pw")
        _, caller.key = client.predict(api_name="/key")
        assert caller.upload("my.canvas", (tmp_path / "my.canvas").read_bytes()) == 204
        told, picture = client.predict(api_name="/open")
        assert "my.canvas is open" in told and np.array_equal(opened(picture), alone.canvas.image)
        told, picture = client.predict(data_url(photo), api_name="/open")
        assert "at the photo's own size" in told and np.array_equal(opened(picture), alone.image)
        _, picture = client.predict("make it day", steps=2, api_name="/edit")
        for _ in alone.steps([("make it day", None)], steps=2):
            pass
        assert np.array_equal(opened(picture), alone.image)
        status, data, _ = caller.ask("GET", f"/save/{caller.key}/canvas")
        (tmp_path / "back.canvas").write_bytes(data)
        back = emilie_min.open(tmp_path / "back.canvas", shipped)
        assert status == 200 and [s.id for s in back.states[:2]] == [s.id for s in alone.canvas.states[:2]]
        assert np.array_equal(back.image, alone.canvas.image)
