"""Encodings that are not said: the right letters, or an error that lists the readings; never the wrong letters."""

import random

import pytest

from luthier.data.sources import encoding, read
from luthier.errors import DataError

WORDS = {
    "Polish": "łódka żółty ćma gęś jaźń mąż książka święto dziękuję proszę że się nie być może dzień źródło kość "
    "miłość człowiek był miał zrobił mał stół Łódź Kraków Gdańsk Poznań Żywiec Małgorzata Łukasz Paweł Michał Józef "
    "Zażółć przesyłka już też więc również ósmy róża góra król",
    "Czech": "dělá příliš žluťoučký kůň úpěl ďábelské ódy že být jsem který když není děkuji člověk město země řeka "
    "dům stůl škola žena muž dítě Jiří Václav Plzeň Třebíč Děčín Šárka ještě také příště zboží dobrý špatný modrý",
    "French": "été élève très être à là où même forêt garçon français façon leçon noël maïs naïf cœur sœur bœuf "
    "hôpital tôt août île maître connaître déjà père frère problème après côté château âge goût sûr théâtre ça Hélène "
    "François Nîmes Orléans Évreux",
    "German": "schön groß Straße Gerät für über können möchte größer Äpfel Öl Übung Mädchen Bücher Füße süß weiß "
    "König Köln München Nürnberg Lösung Prüfung Größe blöd spät früh ähnlich öffnen Gruß",
    "Spanish": "mañana niño año español señor corazón canción también después más está aquí fácil árbol último música "
    "teléfono jardín avión pingüino vergüenza España Málaga Cádiz León Íñigo Muñoz López cigüeña otoño pequeño",
}
WRITTEN_IN = {"Polish": "cp1250", "Czech": "cp1250"}


@pytest.mark.parametrize("count", [1, 2, 4, 12])
@pytest.mark.parametrize("language", WORDS)
def test_real_words_are_never_read_with_the_wrong_letters(language, count):
    words, codec, draw = WORDS[language].split(), WRITTEN_IN.get(language, "cp1252"), random.Random(0)
    read_right = 0
    tables = [[word] for word in words] if count == 1 else [draw.sample(words, count) for _ in range(40)]
    for table in tables:
        text = "word,n\n" + "".join(f"{word},1\n" for word in table)
        try:
            found, _ = encoding.decode(text.encode(codec), "x.csv")
        except DataError as error:
            allowed = error.faults[0].allowed
            assert isinstance(allowed, list) and "--encoding" in error.faults[0].fix
            assert text in [text.encode(codec).decode(one) for one in allowed]
            continue
        assert found == text
        read_right += 1
    assert read_right == len(tables) or (count < 12 and read_right > len(tables) * (0.4 if count == 1 else 0.7))


SENTENCES = [
    ("cp1250", "To jest bardzo dobry produkt, ale przesyłka przyszła za późno i była uszkodzona."),
    ("iso8859_2", "Zażółć gęślą jaźń"),
    ("cp1250", "Výrobek je velmi dobrý, ale zásilka přišla pozdě a byla poškozená."),
    ("cp1252", "Le produit est très bon, mais le colis est arrivé trop tard et il était abîmé."),
    ("cp1252", "Das Gerät ist sehr gut, aber die Lieferung kam zu spät und war beschädigt."),
    ("cp1252", "El envío llegó tarde y estaba dañado. ¿Qué puedo hacer? Lo recomendaría a mi amigo español."),
    ("cp1252", "perché è così, città"),
    ("cp1250", "Köszönöm szépen, őszinte űr"),
    ("cp1254", "Ürün çok iyi ama teslimat geç kaldı. Değil mi? şöyle"),
    ("cp1252", "it’s “quoted” – 5 € £5 20°C ½ © 2020 Mac® m² 5µm naïve café"),
    ("cp1252", "The price is £5"),
    ("cp1251", "Привет мир"),
    ("cp1251", "Товар очень хороший, но доставка опоздала."),
    ("koi8_r", "Товар очень хороший, но доставка опоздала."),
    ("cp1253", "Το προϊόν είναι πολύ καλό, αλλά η αποστολή άργησε."),
    ("cp932", "住所"),
    ("cp932", "質問,回答\n首都,東京"),
    ("cp932", "株式会社日立製作所"),
    ("cp932", "①,㈱日立,第Ⅲ章"),
    ("cp932", "氏名,住所\n髙橋,東京都葛飾区\n﨑山,埼玉県"),
    ("cp932", "ﾔﾏﾀﾞ ﾀﾛｳ,東京"),
    ("gb18030", "这个产品很好，但是送货太晚了。"),
    ("big5", "姓名,地址\n張三,台北市信義區"),
    ("cp949", "이름,주소\n김철수,서울시 강남구"),
]


@pytest.mark.parametrize(("codec", "text"), SENTENCES)
def test_the_encoding_is_found_by_words_that_a_language_has(codec, text):
    assert encoding.decode(f"a,b\n{text}\n".encode(codec), "x.csv")[0] == f"a,b\n{text}\n"


@pytest.mark.parametrize("codec", ["cp850", "mac_roman", "cp852", "cp437"])
def test_text_of_other_machines_is_not_read_as_one_of_these(codec):
    text = (
        "łódka, żółty" if codec == "cp852" else "ä, ö, ü, é, Straße für élève" if codec == "cp437" else "élève à côté"
    )
    with pytest.raises(DataError, match="encoding"):
        encoding.decode(f"a\n{text}\n".encode(codec), "x.csv")


def test_two_readings_are_shown_where_they_differ_and_either_may_be_said(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("a,b\nété,très\n".encode("cp1252"))
    with pytest.raises(DataError) as caught:
        read(path)
    fault = caught.value.faults[0]
    assert fault.allowed == ["cp1252", "cp1250"] and "très" in fault.received and "trčs" in fault.received
    assert read(path, encoding="cp1252").row(0) == {"a": "été", "b": "très"}


def test_what_tells_an_encoding_may_stand_far_into_a_large_file(tmp_path):
    path = tmp_path / "x.csv"
    plain = "plain text,1\n" * (encoding.SAMPLE // 10)
    path.write_bytes(("a,b\n" + plain + "forêt,çà et là\n").encode("cp1252"))
    assert read(path).row(encoding.SAMPLE // 10) == {"a": "forêt", "b": "çà et là"}
    same = "é,1\n" * encoding.SAMPLE  # until here either reading is the same
    with pytest.raises(DataError, match="cannot be told") as caught:
        encoding.decode(("a,b\n" + same + "mañana,1\n").encode("cp1252"), "x.csv")
    assert caught.value.faults[0].allowed == ["cp1252", "cp1250"]


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_may_hold_characters_of_two_units(codec):
    text = "question,answer\nhow are you,fine 😀\nĀ,ok\n"
    assert encoding.decode(text.encode(codec), "x.csv") == (text, codec)


def test_bytes_with_zeros_are_text_of_no_encoding_that_is_proposed():
    with pytest.raises(DataError, match="not text in any encoding") as caught:
        encoding.decode(b"a,b\n\0\xe9\0\xe8t,12\n", "x.csv")
    assert "--encoding cp" not in caught.value.faults[0].fix


def test_one_byte_of_zero_does_not_make_text_of_two_bytes_a_character(tmp_path):
    path = tmp_path / "x.csv"
    for count in (4, 5):  # on either side of a pair
        path.write_bytes(b"text,label\nhello " + b"w" * count + b"\0rld,pos\nbad,neg" + b"g" * (count - 4) + b"\n")
        with pytest.raises(DataError, match="NUL bytes"):
            read(path)
