"""The shipped words, sentences and questions, the papers' file formats, and the prompts made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses.latent_language.task_prompts import culture_prompt, demonstrations, queries
from analyses.word_lists import (
    CULTURE_LANGUAGES,
    CULTURES,
    read_words,
    shipped_questions,
    shipped_words,
)
from probes.errors import OptionError

LANGUAGES = ("en", "fr", "de", "es", "it", "ru", "zh", "ja")


def test_the_word_list_is_whole() -> None:
    words = shipped_words()
    assert len(words) >= 80
    assert len({w.name for w in words}) == len(words)
    for word in words:
        assert tuple(word.forms) == LANGUAGES
        for forms in word.forms.values():
            assert len(set(forms)) == len(forms)
            assert all(form and form == form.strip() for form in forms)
    for language in LANGUAGES:
        usual = [word.forms[language][0] for word in words]
        assert len(set(usual)) >= len(usual) - 2, language


def test_every_sentence_has_its_blank_and_never_its_word() -> None:
    told = [word for word in shipped_words() if word.cloze]
    assert len(told) >= 50
    assert {language for word in told for language in word.cloze} == {"en", "fr", "de", "zh", "ja"}
    for word in told:
        for language, stem in word.cloze.items():
            assert stem.count('"___"') == 1
            assert word.forms[language][0] not in stem.split(), (word.name, language)


def test_questions_have_two_answers_and_examples_one() -> None:
    questions = [q for q in shipped_questions() if q.kind != "example"]
    assert len(questions) >= 40
    for question in questions:
        for language in CULTURE_LANGUAGES:
            assert question.answers["japan", language] != question.answers["us", language]
    for question in shipped_questions():
        if question.kind == "example":
            assert all(question.answers["japan", lang] == question.answers["us", lang] for lang in CULTURE_LANGUAGES)
        assert all(question.answers[c, lang] for c in CULTURES for lang in CULTURE_LANGUAGES)


def test_translation_prompts_have_the_papers_form() -> None:
    [query] = [q for q in queries(shipped_words(), "translation", "fr", "zh", 4, 0, 42) if q.word.name == "book"]
    *shown, last = query.text.split("\n")
    assert last == 'Français: "livre" - 中文: "'
    assert len(shown) == 4
    for line in shown:
        assert line.startswith('Français: "')
        assert line.endswith('"')
        assert "livre" not in line


def test_demonstrations_follow_the_seed_and_leave_the_query_out() -> None:
    words = shipped_words()
    for index, word in enumerate(words):
        shown = demonstrations(words, word, 4, 7, index)
        assert len({w.name for w in shown}) == 4
        assert word.name not in {w.name for w in shown}
        assert shown == demonstrations(words, word, 4, 7, index)
    texts = [[q.text for q in queries(words, "translation", "en", "fr", 4, 9, seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_repetition_and_cloze_prompts() -> None:
    [dog] = [q for q in queries(shipped_words(), "repetition", "de", "de", 2, 0, 0) if q.word.name == "dog"]
    assert dog.text.endswith('Deutsch: "Hund" - Deutsch: "')
    [book] = [q for q in queries(shipped_words(), "cloze", "zh", "zh", 2, 0, 0) if q.word.name == "book"]
    assert book.text.endswith('"___"有很多印着字的页，人们读它里面的故事。答案："')
    assert book.text.count("答案：") == 3
    [tree] = [q for q in queries(shipped_words(), "cloze", "en", "en", 2, 0, 0) if q.word.name == "tree"]
    assert tree.text.endswith('A "___" is a tall plant with a trunk and branches. Answer: "')


def test_framings_name_the_country_or_not() -> None:
    questions = shipped_questions()
    examples = [q for q in questions if q.kind == "example"]
    plain, japan, us = (culture_prompt(questions[0], examples, "en", f, 0, 0) for f in ("plain", "japan", "us"))
    assert plain.endswith('Question: In what month does the school year start? Answer: "')
    assert japan.endswith('Question: In Japan, in what month does the school year start? Answer: "')
    assert "United States" in us
    assert plain.count("Question:") == len(examples) + 1


def test_a_table_with_one_column_per_language(tmp_path: Path) -> None:
    path = tmp_path / "words.csv"
    path.write_text("# where from\nen,fr\nsea|ocean,mer\n", encoding="utf-8")
    [word] = read_words(path)
    assert word.forms == {"en": ("sea", "ocean"), "fr": ("mer",)}


def test_the_first_papers_files(tmp_path: Path) -> None:
    head = "lang,word_original,word_translation,blank_prompt_original,blank_prompt_translation,blank_prompt_translation_masked\n"
    for language, line in (
        ("fr", 'fr,sea,mer,x,y,"Une ""___"" est salée. Réponse : ""mer""."\n'),
        ("zh", 'zh,sea,海,x,y,"""_""是咸的。答案：""海""。"\n'),
    ):
        (tmp_path / language).mkdir()
        (tmp_path / language / "clean.csv").write_text(head + line, encoding="utf-8")
    [word] = read_words(tmp_path)
    assert word.forms == {"en": ("sea",), "fr": ("mer",), "zh": ("海",)}
    assert word.cloze == {"fr": 'Une "___" est salée. Réponse ', "zh": '"_"是咸的。答案'}
    assert read_words(tmp_path / "fr" / "clean.csv")[0].forms == {"en": ("sea",), "fr": ("mer",)}


def test_the_second_papers_table(tmp_path: Path) -> None:
    path = tmp_path / "multi5.csv"
    path.write_text(
        'ja_prompt_masked,en_prompt_masked,ja,zh,en,fr,ja1,zh1,en1,fr1,ar\n"""__""は塩辛い。答え: ""海""",'
        '"""__"" is salty. Answer: ""sea""",海,海,sea,mer,大洋,洋,ocean,océan,بحر\n',
        encoding="utf-8",
    )
    [word] = read_words(path)
    assert word.forms["ja"] == ("海", "大洋")
    assert word.forms["ar"] == ("بحر",)
    assert word.cloze == {"ja": '"__"は塩辛い。答え', "en": '"__" is salty. Answer'}


@pytest.mark.parametrize(
    ("text", "said"), [("a,b\n1,2\n", "columns are a, b"), ("en,fr\ndog\n", "row 2"), ("", "columns are none")]
)
def test_other_tables_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "words.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=said):
        read_words(path)
    with pytest.raises(OptionError, match="does not exist"):
        read_words(tmp_path / "none.csv")
