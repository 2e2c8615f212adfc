"""A conversation in the terminal: what the model sees, what is remembered, and what a line means."""

import pytest

from ett.chat import Conversation, Terminal
from ett.inference import ModelError, load_ett


@pytest.fixture(scope="module")
def loaded(models):
    return load_ett(str(models / "ett-chat"))


@pytest.fixture
def conversation(loaded):
    return Conversation(*loaded, max_new_tokens=5)


@pytest.fixture
def terminal(conversation, models, tmp_path):
    """Carries out lines, one after the other, and gives back all that it wrote."""

    def run(capsys, *lines):
        left = iter(lines)

        def read(prompt):
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        Terminal(conversation, str(models / "ett-gen"), tmp_path, seed=3).run(read)
        return capsys.readouterr().out.partition("Ctrl-C stops an answer\n")[2]

    return run


def test_an_answer_comes_in_pieces_that_make_it_up(conversation, image):
    conversation.show(str(image))
    pieces = []
    answer = conversation.ask("what color is the circle ?", pieces.append)
    assert answer and "".join(pieces).strip() == answer
    assert len(pieces) > 1


def test_all_turns_and_images_are_seen_again(conversation, image, monkeypatch):
    seen = []
    generate = conversation.model.generate
    monkeypatch.setattr(conversation.model, "generate", lambda **kwargs: seen.append(kwargs) or generate(**kwargs))
    conversation.show(str(image))
    first = conversation.ask("what color is the circle ?")
    conversation.ask("is the square red ?")
    assert [len(kwargs["pixel_values"]) for kwargs in seen] == [1, 1]
    text = conversation.processor.tokenizer.decode(seen[1]["input_ids"][0])
    assert "what color is the circle" in text and first in text and "is the square red" in text


def test_a_new_conversation_knows_nothing_of_the_former(conversation, image):
    conversation.show(str(image))
    conversation.ask("a red circle")
    conversation.begin_anew()
    assert (conversation.messages, conversation.images, conversation.shown) == ([], [], [])


def test_a_question_that_cannot_be_asked_changes_nothing(conversation, image):
    conversation.show(str(image))
    with pytest.raises(ValueError, match="'zebra' is beyond this model's vocabulary"):
        conversation.ask("is the zebra red ?")
    assert conversation.messages == [] and len(conversation.shown) == 1


def test_a_conversation_beyond_the_context_is_an_error(conversation, monkeypatch):
    monkeypatch.setattr(conversation.model.config.text_config, "max_position_embeddings", 4)
    with pytest.raises(ValueError, match=r"the model's context ends at 4; start a new conversation with /new"):
        conversation.ask("what color is the circle ?")


def test_an_interrupted_answer_is_what_there_was(conversation):
    def interrupt(piece):
        raise KeyboardInterrupt

    assert conversation.ask("a red circle", interrupt) == conversation.messages[-1]["content"][0]["text"]


def test_a_path_in_a_message_shows_the_image(terminal, conversation, image, capsys):
    out = terminal(capsys, f"{image} what color is the circle ?")
    assert out.strip() == conversation.messages[-1]["content"][0]["text"]
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
    assert len(conversation.images) == 1


def test_an_image_shown_alone_goes_with_the_next_message(terminal, conversation, image, capsys):
    terminal(capsys, f"/image {image}", "a red circle", "a blue square")
    assert [len(message["content"]) for message in conversation.messages] == [2, 1, 1, 1]


def test_drawings_go_into_new_files(terminal, tmp_path, capsys):
    (tmp_path / "drawing-1.png").write_bytes(b"")
    out = terminal(capsys, "/draw a red circle", "/draw a red circle")
    assert out == f"Wrote {tmp_path / 'drawing-2.png'} (seed 3).\nWrote {tmp_path / 'drawing-3.png'} (seed 4).\n"
    assert (tmp_path / "drawing-2.png").read_bytes() != (tmp_path / "drawing-3.png").read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/paint a circle", "/paint is not a command; /help lists all commands."),
        ("/image", "/image needs a path after it."),
        ("/draw", "/draw needs a prompt after it."),
        ("a zebra", "The word 'zebra' is beyond this model's vocabulary"),
        ("/image missing.png", "missing.png"),
        ("/image http://127.0.0.1:0/scene.png", "'http://127.0.0.1:0/scene.png' cannot be fetched"),
        ("red <image>", "The text has 1 <image> and there are 0 images; give one image for each."),
    ],
)
def test_what_went_wrong_is_one_sentence_and_the_conversation_goes_on(terminal, capsys, line, said):
    lines = terminal(capsys, line, "a red circle").splitlines()
    assert said in lines[0] and len(lines) == 2


def test_a_chat_model_asked_to_draw(conversation, models, tmp_path):
    terminal = Terminal(conversation, str(models / "ett-chat"), tmp_path)
    with pytest.raises(ModelError, match=r"ett-chat has no visual head, .* name a generation model such as ett-gen"):
        terminal.carry_out("/draw a red circle")


def test_quit_leaves(terminal, conversation, capsys):
    terminal(capsys, "/quit", "a red circle")
    assert conversation.messages == []
