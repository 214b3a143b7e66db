import gzip
import json
import types
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlm_jax.data.raw_files import open_table
from bdlm_jax.data.readers import clean_title, load_source
from bdlm_jax.data.splits import TEST, TRAIN
from bdlm_jax.types import InputError


def write(folder, files, encoding="utf-8"):
    """Writes {name: text or bytes}; the texts of names in .gz are compressed."""
    for name, data in files.items():
        if isinstance(data, str):
            data = data.encode(encoding)
            data = gzip.compress(data) if name.endswith(".gz") else data
        (folder / name).write_bytes(data)
    return folder


def rows(x):
    return [(str(x.user_ids[u]), str(x.item_ids[i]), int(t)) for u, i, t in zip(x.user_E, x.item_E, x.time_E)]


def test_a_table_with_mapped_columns_items_and_users(tmp_path):
    write(tmp_path, {
        "clicks.tsv.gz": "when\twho\twhat\tstars\n9\tbob\tb1\t4.5\n8\tbob\ta1\t2\n7\tann\tb1\t5\n",
        "things.csv": 'key,name,maker\na1,"Salt &amp; ""Pepper""",Acme\nb1,  Two\tblanks ,\n',
        "people.csv": "user_id,job\nbob,writer\n",
    })  # fmt: skip
    x = load_source(
        "table", tmp_path / "clicks.tsv.gz", columns={"user": "who", "item": "what", "time": "when", "rating": "stars"},
        items="things.csv", item_columns={"id": "key", "title": "name", "brand": "maker"},
        users=tmp_path / "people.csv",
    )  # fmt: skip
    assert rows(x) == [("ann", "b1", 7), ("bob", "a1", 8), ("bob", "b1", 9)]
    assert x.rating_E.tolist() == [5, 2, 4.5]
    assert x.item_text(("title", "brand")) == ['Salt & "Pepper"; Acme', "Two blanks"]
    assert x.user_text(("job",)) == ["", "writer"]


@pytest.mark.parametrize("last", ["5", "5.5", "x"])
def test_a_table_read_in_parts_is_the_same_as_in_one(tmp_path, monkeypatch, last):
    """Whatever comes late: an id that was met before, a number that is not whole, or none at all."""
    write(tmp_path, {"a.csv": f"user,item,rating\n007,x,1\n7,y,2\n007,y,3\n8,x,4\n7,z,{last}\n"})

    def read(at_once):
        monkeypatch.setattr("bdlm_jax.data.raw_files._ROWS", at_once)
        try:
            return load_source("table", tmp_path / "a.csv").fingerprint()
        except InputError as error:
            return str(error)

    assert read(2) == read(1000)
    assert ("line 6: field 'rating' is 'x'" in str(read(2))) == (last == "x")


def test_a_folder_of_tables_is_recognised(tmp_path):
    write(tmp_path, {
        "interactions.csv.gz": "user_id,item_id,order\n1,10,1\n1,9,0\n2,9,0\n",
        "items.tsv.gz": 'item\tasin\ttitle\n9\tB9\tNine "inch" comb\n10\tB10\tTen\n11\tB11\tEleven\n',
    })  # fmt: skip
    x = load_source("table", tmp_path)
    assert rows(x) == [("1", "9", 0), ("1", "10", 1), ("2", "9", 0)]
    assert (x.time_kind, x.item_text(("title", "asin"))) == ("order", ['Nine "inch" comb; B9', "Ten; B10"])
    assert load_source("table", tmp_path, keep_items_without_interactions=True).item_text()[2] == "Eleven"


@pytest.mark.parametrize("text", ["7;x;3\n8;y;4\n", "7::x::3\n8::y::4\n"])
def test_a_table_without_header_and_with_other_separators(tmp_path, text):
    write(tmp_path, {"a.txt": text})
    x = load_source("table", tmp_path / "a.txt", header=False, columns={"user": 0, "item": 1, "time": 2})
    assert rows(x) == [("7", "x", 3), ("8", "y", 4)]


ODD_IDS = "007", "NA", "null", "1.0", "1e3", "True", "+4", " 4", "a b", "ä", "00", "12345678901234567890", "--5", ""
IDS = st.one_of(st.integers(-5, 30).map(str), st.sampled_from(ODD_IDS))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(IDS, IDS, st.integers(0, 10**12)), min_size=1, max_size=8),
    st.sampled_from([",", "\t", "::", "|"]),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.integers(0, 8),
)
def test_a_table_is_read_as_it_stands(rows, separator, end, n_quoted):
    """Against the rows themselves: no id becomes a number, nothing goes missing, and lines keep their numbers."""
    texts = [[f'"{user},"', item, str(time)] if n < n_quoted else [user, item, str(time)]
             for n, (user, item, time) in enumerate(rows)]  # fmt: skip
    data = "".join(separator.join(row) + end for row in texts).encode()
    file = types.SimpleNamespace(label="t", read=lambda: data)
    table = open_table(file, separator=separator, header=False)
    if separator == ",":
        texts = [[user.strip('"'), item, time] for user, item, time in texts]
    assert [list(row) for row in table.rows()] == texts
    columns = table.columns({"user": 0, "item": 1, "time": 2})
    assert [[str(v) for v in columns[name]] for name in ("user", "item", "time")] == list(map(list, zip(*texts)))
    assert table.where(len(rows) - 1) == f"t, line {1 + (len(rows) - 1) * end.count(chr(10))}"


MOVIES = "1::Matrix, The (1999)::Action|Sci-Fi\n2::Cité, La (1995)::Drama\n3::Unseen (2000)::(no genres listed)\n"
USERS = "1::F::1::10::00000\n2::M::25::12::00000\n"
RATINGS = {"movies.dat": MOVIES, "users.dat": USERS, "ratings.dat": "1::1::5::100\n1::2::3::99\n2::1::4::5\n"}
ORDERS = {"movies.dat": MOVIES, "interactions.csv.gz": "user_id,item_id,order\n1,1,1\n1,2,0\n2,1,0\n"}
FLAGS = ["|".join("1" if k in on else "0" for k in range(19)) for on in ((1, 15), (8,), (0,))]
TABS = {
    "u.data": "1\t1\t5\t100\n1\t2\t3\t99\n2\t1\t4\t5\n",
    "u.item": "1|Matrix, The (1999)|||u|{}\n2|Cité, La (1995)|||u|{}\n3|unknown||||{}\n".format(*FLAGS),
    "u.user": "1|24|F|writer|x\n2|53|M|other|x\n",
}
COMMAS = {
    "ratings.csv": "userId,movieId,rating,timestamp\r\n1,1,5.0,100\r\n1,2,3.5,99\r\n2,1,4.0,5\r\n",
    "movies.csv": 'movieId,title,genres\r\n1,"Matrix, The (1999)",Action|Sci-Fi\r\n2,"Cité, La (1995)",Drama\r\n',
}


@pytest.mark.parametrize(
    ("files", "encoding", "ratings", "users"),
    [
        (RATINGS, "latin-1", [3, 5, 4], ["female; under 18; K-12 student", "male; 25-34; programmer"]),
        (ORDERS, "latin-1", None, None),
        (TABS, "latin-1", [3, 5, 4], ["female; 24; writer", "male; 53; other"]),
        (COMMAS, "utf-8", [3.5, 5, 4], None),
    ],
)
def test_movielens_of_every_edition(tmp_path, files, encoding, ratings, users):
    x = load_source("movielens", write(tmp_path, files, encoding))
    assert x.item_ids.tolist() == ["1", "2"]
    assert x.item_text(("title", "genres")) == ["The Matrix (1999); Action, Sci-Fi", "La Cité (1995); Drama"]
    assert [row[:2] for row in rows(x)] == [("1", "2"), ("1", "1"), ("2", "1")]
    assert (x.time_E.tolist(), x.time_kind) == (([99, 100, 5], "timestamp") if ratings else ([0, 1, 0], "order"))
    assert (None if x.rating_E is None else x.rating_E.tolist()) == ratings
    assert (x.user_text(("gender", "age", "occupation")) if x.user_fields else None) == users


def test_movielens_in_a_nested_folder_or_a_zip_is_the_same(tmp_path):
    folder = tmp_path / "a" / "ml-1m"
    folder.mkdir(parents=True)
    write(folder, RATINGS, "latin-1")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for name in RATINGS:
            archive.write(folder / name, f"ml-1m/{name}")
    x, y, z = (load_source("movielens", tmp_path / name) for name in ("a/ml-1m", "a", "ml-1m.zip"))
    assert x.fingerprint() == y.fingerprint() == z.fingerprint()
    every_movie = load_source("movielens", folder, keep_items_without_interactions=True)
    assert every_movie.item_text(("title", "genres"))[2] == "Unseen (2000)"


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Plan, A (2001)", "A Plan (2001)"),
        ("Avventura, L' (1960)", "L'Avventura (1960)"),
        ("City, La (City, The) (1995)", "La City (The City) (1995)"),
        ("Crow, The: Wicked Prayer (2005)", "The Crow: Wicked Prayer (2005)"),
        ("Cry, the Beloved Country (1995)", "Cry, the Beloved Country (1995)"),
        ("Bye Bye, Love (1995)", "Bye Bye, Love (1995)"),
        ("Se7en", "Se7en"),
        ("Half (open, The", "Half (open, The"),
        ("(500) Days of Summer (2009)", "(500) Days of Summer (2009)"),
    ],
)
def test_articles_return_to_the_front(published, said):
    assert clean_title(published) == said


def test_recbole_atomic_files(tmp_path):
    write(tmp_path, {
        "d.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu1\ti2\t3\t20\nu1\ti1\t4.5\t1e1\n",
        "d.item": 'item_id:token\tmovie_title:token_seq\tclass:token_seq\ni1\tThe "One"\tDrama War\ni2\tTwo\t\n',
        "d.user": "user_id:token\tage:token\nu1\t24\n",
    })  # fmt: skip
    x = load_source("recbole", tmp_path)
    assert rows(x) == [("u1", "i1", 10), ("u1", "i2", 20)]
    assert x.item_text(("title", "class")) == ['The "One"; Drama War', "Two"]
    assert x.user_text(("age",)) == ["24"]
    assert load_source("recbole", tmp_path, title="class").item_text() == ["Drama War", ""]
    write(tmp_path, {"e.inter": "user_id:token\titem_id:token\nu1\ti2\n"})
    assert len(load_source("recbole", tmp_path, name="e")) == 1


REVIEWED = [("U2", "B1", 4.0, 20), ("U1", "B1", 5.0, 10), ("U1", "B2", 3.0, 30)]
AMAZON = {  # the names of a review's fields, and lines of metadata
    2014: (
        ("reviewerID", "asin", "overall", "unixReviewTime"),
        "{'asin': 'B1', 'title': 'Men\\'s <b>Soap</b> &amp; Oil', 'brand': 'Acme',"
        " 'categories': [['Health'], ['Beauty', 'Soap']]}\n{'asin': 'B9', 'title': 'Never reviewed'}\n",
    ),
    2018: (
        ("reviewerID", "asin", "overall", "unixReviewTime"),
        '{"asin": "B1", "title": "Men\'s Soap &amp; Oil", "brand": "Acme", "category": ["Beauty", "Soap"],'
        ' "description": []}\n{"asin": "B2", "title": "var aPageStart = (new Date()).getTime();"}\n',
    ),
    2023: (
        ("user_id", "parent_asin", "rating", "timestamp"),
        '{"parent_asin": "B1", "title": "Men\'s Soap & Oil", "store": "Acme", "categories": ["Beauty", "Soap"],'
        ' "description": null}\n',
    ),
}


@pytest.mark.parametrize("year", AMAZON)
def test_amazon_reviews_of_every_edition(tmp_path, year):
    names, metadata = AMAZON[year]
    reviews = [dict(zip(names, review)) | {"asin": review[1] if year < 2023 else "x"} for review in REVIEWED]
    reviews = "".join(json.dumps(review) + "\n" for review in reviews)
    write(tmp_path, {"reviews_X_5.json.gz": reviews, "meta_X.json.gz": metadata})
    x = load_source("amazon", tmp_path)
    assert rows(x) == [("U1", "B1", 10), ("U1", "B2", 30), ("U2", "B1", 20)]
    assert x.rating_E.tolist() == [5, 3, 4]
    assert x.item_text(("title", "brand", "categories")) == ["Men's Soap & Oil; Acme; Beauty, Soap", ""]
    assert x.item_text(("description",)) == ["", ""]
    y = load_source("amazon", tmp_path / "reviews_X_5.json.gz", metadata=tmp_path / "meta_X.json.gz")
    assert x.fingerprint() == y.fingerprint()
    if year == 2014:
        cold = load_source("amazon", tmp_path, keep_items_without_interactions=True)
        assert cold.item_text() == ["Men's Soap & Oil", "", "Never reviewed"]


def test_adjacency_lists_are_a_split_without_validation(tmp_path):
    write(tmp_path, {"train.txt.gz": "0 5 3 4\n1 3\n\n2\n", "test.txt.gz": "0 1\n1 5 0\n2\n"})
    split = load_source("adjacency", tmp_path)
    assert split.counts() == {"train": 4, "validation": 0, "test": 3}
    x = split.interactions
    assert x.item_ids.tolist() == ["0", "1", "3", "4", "5"]
    assert [part.tolist() for part in split.cases(TEST)] == [[0, 1, 1], [1, 4, 0]]
    indptr, item = split.histories(TRAIN)
    assert (indptr.tolist(), x.item_ids[item].tolist()) == ([0, 3, 4], ["5", "3", "4", "3"])


def test_times_of_tables_stay_exact_and_texts_have_encodings(tmp_path):
    write(tmp_path, {"t.csv": "user,item,time\n1,2,1700000000123456789\n"})
    assert load_source("table", tmp_path / "t.csv").time_E.tolist() == [1700000000123456789]
    write(tmp_path, {"latin.csv": 'user,item\n1,2\nä,3\n"x",4\n'}, "latin-1")
    assert load_source("table", tmp_path / "latin.csv", encoding="latin-1").user_ids.tolist() == ["1", "x", "ä"]


T, INTER, REVIEW = "t.csv", "user_id:token\titem_id:token\n", json.dumps(dict(zip(AMAZON[2014][0], REVIEWED[0]))) + "\n"
ROW, ML = {T: "user,item,time\n1,2,3\n"}, {"movies.dat": MOVIES, "users.dat": USERS, "ratings.dat": "1::1::5::100\n"}
LISTS = {"train.txt.gz": "0 5 3 4\n1 3\n"}
REFUSED = [
    ("table", T, {T: "user,item,time\n1,2,3\n1,2\n"}, "t.csv, line 3: 2 fields where 3 are needed"),
    ("table", T, {T: "user,item,time\n1,2,3,4\n1,2\n"}, "t.csv, line 2: 4 fields where 3 are needed"),
    ("table", T, {T: "user,item,note\n1,2,3,4\n1,2\n"}, "t.csv, line 2: 4 fields where 3 are needed"),
    ("table", T, {T: 'user,item,note\n1,2,"3,4"\n1,2\n'}, "t.csv, line 3: 2 fields where 3 are needed"),
    ("table", T, {T: "user,item,time\n1,2,3\n\n1,3,x\n"}, "t.csv, line 4: field 'time' is 'x'"),
    ("table", T, {T: 'user,item,time\n"a\nb",2,3\n1,3,-4\n'}, "t.csv, line 4: field 'time' is -4"),
    ("table", T, {T: "user,item,time\n1,2,3\n1,3,2.5\n"}, "t.csv, line 3: field 'time' is 2.5"),
    ("table", T, {T: "user,item,time\n1,2,3\n1,3,\n"}, "t.csv, line 3: field 'time' is ''"),
    ("table", T, {T: "user,item,time\n1,2,3\n,3,1\n"}, "t.csv, line 3: field 'user' is empty"),
    ("table", T, {T: 'user,item,time\n1,"2,3\n'}, "t.csv, line 2: unexpected end of data"),
    ("table", T, {T: "user,item,rating\n1,2,nan\n"}, "t.csv, line 2: field 'rating' is 'nan'"),
    ("table", T, {T: "person,item,time\n1,2,3\n"}, "no column for 'user' .it has person, item, time."),
    ("table", T, {T: "user,item,time\n"}, "has no rows"),
    ("table", T, {T: ""}, "line 1: the table is empty"),
    ("table", T, {T: b"user,item\n1,2\n\xe4,3\n"}, "line 3: the text is not utf-8"),
    ("table", T, ROW, "no column 'thing' for 'item'", {"columns": {"user": "user", "item": "thing"}}),
    ("table", T, ROW, "no column 7 for 'item'", {"columns": {"user": "user", "item": 7}}),
    ("table", T, ROW, "the role 'mood'", {"columns": {"user": "user", "item": "item", "mood": "time"}}),
    ("table", T, ROW, "give the positions of user and item in config.data.options.columns", {"header": False}),
    ("table", T, ROW, "none.csv is not there", {"items": "none.csv"}),
    ("table", T, ROW, "no id column", {"items": T, "item_columns": {"title": "item"}}),
    ("table", T, ROW, "no column 'name'", {"items": T, "item_columns": {"id": "item", "title": "name"}}),
    ("table", T, ROW, "no option 'colums'", {"colums": {}}),
    ("tables", T, ROW, "the data kind is 'tables'"),
    ("table", "none.csv", {}, "is not there"),
    ("table", "", {"x.csv": ""}, "has no interactions.csv"),
    ("table", "b.csv.gz", {"b.csv.gz": gzip.compress(b"user,item\n1,2\n" * 99)[:-9]}, "b.csv.gz cannot be read"),
    ("movielens", "", ML | {"ratings.dat": "1::1::5::100\n1::2::3\n"}, "ratings.dat, line 2: 3 fields where 4 are"),
    ("movielens", "", ML | {"ratings.dat": "1::2::3::now\n"}, "ratings.dat, line 1: field 'time' is 'now'"),
    ("movielens", "", ML | {"movies.dat": "1::A::B\n2::A\n"}, "movies.dat, line 2: 2 fields where 3 are needed"),
    ("movielens", "", ML | {"users.dat": "1::F::1::10::0\n2::M::26::1::0\n"}, "users.dat, line 2: gender, age"),
    ("movielens", "", {"movies.dat": MOVIES}, "has movies.dat but no ratings.dat"),
    ("movielens", "", {"movies.dat": MOVIES, "interactions.csv": "user,item,order\n"}, "no column 'user_id'"),
    ("movielens", "", {"u.data": "1\t1\t5\t1\n", "u.item": "1|A|||" + "|2" * 19 + "\n"}, "u.item, line 1: the genre"),
    ("movielens", "", {"x.csv": ""}, "holds neither"),
    ("movielens", "ml.zip", {"ml.zip": "no zip"}, "neither a folder nor a zip"),
    ("recbole", "", {"d.inter": INTER, "e.inter": INTER}, r"holds 2 \.inter files"),
    ("recbole", "", {"d.inter": INTER}, r"has no e\.inter", {"name": "e"}),
    ("recbole", "", {"d.inter": "user_id:token\titem_id\nu1\ti2\n"}, "line 1: 'item_id' is not name:type"),
    ("recbole", "", {"d.inter": INTER + "1\t2\n", "d.item": INTER}, "line 1: no field 'x'", {"title": "x"}),
    ("amazon", "r.json", {"r.json": REVIEW + "{'asin': __import__('os')}"}, "line 2: this is neither a JSON"),
    ("amazon", "r.json", {"r.json": REVIEW + "[1, 2]"}, "line 2: this is neither"),
    ("amazon", "r.json", {"r.json": REVIEW + "(" * 5000}, "line 2: this is neither"),
    ("amazon", "r.json", {"r.json": REVIEW + REVIEW.replace("unixReviewTime", "when")}, "line 2: .*'unixReviewTime'"),
    ("amazon", "r.json", {"r.json": REVIEW + REVIEW.replace('"B1"', "3")}, "line 2: .* unusable .'asin'."),
    ("amazon", "r.json", {"r.json": REVIEW + REVIEW.replace("20", "-1")}, "line 2: field 'time' is -1"),
    ("amazon", "", {"reviews.json": '{"asin": "B1", "title": "metadata"}\n'}, "line 1: no field for 'user'"),
    ("amazon", "", {"r.json": REVIEW, "meta_X.json": '{"title": "A"}\n'}, "line 1: no field asin or parent_asin"),
    ("amazon", "", {"a.json": REVIEW, "b.json": REVIEW}, "must hold one review file"),
    ("amazon", "r.json", {"r.json": ""}, "has no review"),
    ("amazon", "c.json.gz", {"c.json.gz": gzip.compress(REVIEW.encode())[:-9]}, "c.json.gz cannot be read after line"),
    ("adjacency", "", LISTS | {"test.txt": "0 1\n1 5 3\n"}, "test.txt, line 2: this user-item pair is also"),
    ("adjacency", "", LISTS | {"test.txt": "0 1\n1 x\n"}, "test.txt, line 2: ids must be whole numbers"),
    ("adjacency", "", LISTS, "must hold train.txt and test.txt"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[case[3] for case in REFUSED])
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, case):
    kind, path, files, message, *options = case
    write(tmp_path, files)
    with pytest.raises(InputError, match=message):
        load_source(kind, tmp_path / path, **dict(*options))
