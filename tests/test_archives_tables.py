"""A CSV or Parquet table of photographs: what its columns may be called and hold, and a message for every mistake."""

import re
from pathlib import Path

import polars as pl
import pytest

from vit_nabirds.data.archives import Archive, read_archive
from vit_nabirds.errors import UserError

SIMPLE = "path,label,split\na.jpg,Teal,train\nb.jpg,Wren,train\nc.jpg,Teal,test\n"
WHOLE = "photographs have no box and are used whole"


def write(folder: Path, text: str, name: str = "birds.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def rows(archive: Archive) -> list[tuple]:
    return archive.table.select("source", "subcategory", "is_training_img").rows()


ROWS = [("a.jpg", "Teal", True), ("b.jpg", "Wren", True), ("c.jpg", "Teal", False)]


def test_a_table_is_named_itself_or_by_its_folder(tmp_path):
    file = write(tmp_path, SIMPLE)
    for named in (file, tmp_path):
        archive = read_archive(named)
        assert (archive.kind, archive.folder) == ("a table (birds.csv)", tmp_path)
        assert rows(archive) == ROWS
        assert archive.notes == {WHOLE: 3}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_line_ends_and_a_byte_order_mark(tmp_path, separator, end):
    text = "\ufeff" + SIMPLE.replace(",", separator).replace("\n", end) + end * 2
    assert rows(read_archive(write(tmp_path, text))) == ROWS


@pytest.mark.parametrize(
    "header",
    ["file,class,subset", " File Name ,Class-Name,SPLIT", "filepath,species,set", "image,category,is_training_img",
     "label,path,split", "filename,species_name,partition", "path,label,split,class,file"],
)  # fmt: skip
def test_columns_have_several_names(tmp_path, header):
    body = SIMPLE.split("\n", 1)[1]
    if header.startswith("label"):
        body = "Teal,a.jpg,1\nWren,b.jpg,1\nTeal,c.jpg,0\n"
    assert rows(read_archive(write(tmp_path, header + "\n" + body))) == ROWS


@pytest.mark.parametrize(
    "values", [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("TRAINING", "Testing"), ("train", "val")]
)
def test_splits_have_several_names(tmp_path, values):
    text = re.sub("train$", values[0], SIMPLE.replace("test", values[1]), flags=re.M)
    assert rows(read_archive(write(tmp_path, text))) == ROWS


def test_quotes_spaces_and_dots(tmp_path):
    text = 'path,label\n./a.jpg,"Teal, blue"\n"b,1.jpg" , Wren  x\n"c ""d"".jpg","Wren x"\n,\n\n'
    with pytest.raises(
        UserError, match="row 3: a quote is not closed, or not at the start or end of its value. Correct"
    ):
        read_archive(write(tmp_path, text))
    archive = read_archive(write(tmp_path, text.replace('" ,', '",')), test_share=0.5)
    assert archive.table.select("source", "subcategory").rows() == [
        ("a.jpg", "Teal, blue"), ("b,1.jpg", "Wren x"), ('c "d".jpg', "Wren x")
    ]  # fmt: skip


def test_paths_may_be_relative_to_a_folder_beside_the_table(tmp_path):
    for name in ("images", "thumbnails"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"-")
    assert rows(read_archive(write(tmp_path, SIMPLE)))[0][0] == "images/a.jpg"


def test_one_table_for_each_split(tmp_path):
    write(tmp_path, "path,label\na.jpg,Teal\nb.jpg,Wren\n", "train.csv")
    pl.DataFrame({"path": ["c.jpg"], "label": ["Teal"]}).write_parquet(tmp_path / "birds_test.parquet")
    archive = read_archive(tmp_path)
    assert sorted(rows(archive)) == ROWS and archive.kind == "a table (birds_test.parquet, train.csv)"
    write(tmp_path, SIMPLE, "more.csv")
    with pytest.raises(UserError, match="birds_test.parquet, more.csv, train.csv could all hold the labels. Name one"):
        read_archive(tmp_path)


def boxes(archive: Archive) -> list[tuple]:
    return archive.table.select("path", "source", "bb_x", "bb_y", "bb_width", "bb_height").rows()


BOXES = """path,label,split,bb_x,bb_y,bb_width,bb_height,width,height,photographer
a.jpg,Teal,train,-2,1.5,10,5,100,80,Ada
a_2.jpg,Wren,train,,,,,inf,0,
a.jpg,Wren,train,90,70,20,20,100,80,Ada
b.jpg,Teal,test,1,2,3,4,,,Bo  B
"""


def test_boxes_are_clamped_and_each_has_its_own_path(tmp_path):
    archive = read_archive(write(tmp_path, BOXES))
    assert boxes(archive) == [
        ("a.jpg", "a.jpg", 0, 1.5, 8, 5),
        ("a_2.jpg", "a_2.jpg", None, None, None, None),
        ("a__2.jpg", "a.jpg", 90, 70, 10, 10),
        ("b.jpg", "b.jpg", 1, 2, 3, 4),
    ]
    assert archive.table["photographer"].to_list() == ["Ada", None, "Ada", "Bo B"]
    assert archive.table["width"].to_list() == [100, None, 100, None]
    assert archive.notes == {WHOLE: 1, "boxes stuck out of their image and were clamped": 2}


def test_whole_photographs_are_used_once_and_those_of_two_classes_not(tmp_path):
    archive = read_archive(write(tmp_path, BOXES + "b.jpg,Teal,test,9,9,9,9,,,\n"), crop="none")
    assert boxes(archive) == [(name, name, None, None, None, None) for name in ("a_2.jpg", "b.jpg")]
    assert archive.notes == {
        "photographs or boxes are of several classes and were left out": 1,
        "further rows of a photograph or box that is used once": 1,
        "species have no train photograph": 1,
    }


def test_corners_are_boxes_too(tmp_path):
    text = "file,class,split,xmin,ymin,xmax,ymax\na,Teal,1,1,2,4,8\nb,Wren,1,0,0,5,5\nc,Teal,0,,,,\n"
    assert boxes(read_archive(write(tmp_path, text)))[0] == ("a", "a", 1, 2, 3, 6)


def test_labels_may_be_numbers(tmp_path):
    for label in ("7,8", "7.0,8.0"):
        seven, eight = label.split(",")
        archive = read_archive(write(tmp_path, SIMPLE.replace("Teal", seven).replace("Wren", eight)))
        assert archive.table["subcategory"].to_list() == ["7", "8", "7"]
        assert archive.notes == {WHOLE: 3, "classes have numbers for names": 2}


def test_parquet_of_other_types(tmp_path):
    table = pl.DataFrame({
        "path": pl.Series(["a.jpg", "b.jpg", "c.jpg"], dtype=pl.Categorical), "label": [7.0, 8.0, 7.0],
        "split": [True, True, False], "bb_x": [1, 1, None], "bb_y": [2.0, 2.0, float("nan")],
        "bb_width": [3, 3, None], "bb_height": pl.Series([4, 4, None], dtype=pl.UInt8), "tags": [["x"], [], None],
    })  # fmt: skip
    table.write_parquet(tmp_path / "birds.parquet")
    archive = read_archive(tmp_path)
    assert rows(archive) == [("a.jpg", "7", True), ("b.jpg", "8", True), ("c.jpg", "7", False)]
    assert boxes(archive)[1:] == [("b.jpg", "b.jpg", 1, 2, 3, 4), ("c.jpg", "c.jpg", None, None, None, None)]


def changed(row: int, text: str) -> str:
    lines = SIMPLE.split("\n")
    lines[row - 1] = text
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na,T\nb,W\n", ": no test photograph. Give some rows the value test in a column split, or give --"),
        (SIMPLE.replace("train", "test"), ": no train photograph. Give some rows the value train in a column split."),
        (SIMPLE.replace("Wren", "Teal"), ": all 3 photographs are of one class, 'Teal'. Give photographs of at least "),
        (changed(3, "a.jpg,Teal,train"), ", row 2: path a.jpg is in two rows (with the same box, if any), here with c"),
        (changed(4, "a.jpg,Wren,train"), ", row 2: path a.jpg is in two rows"),
        (changed(3, "../b.jpg,Wren,train"), ", row 3: path ../b.jpg is not of the form <folder>/<file> below "),
        (changed(3, "/data/b.jpg,Wren,train"), ", row 3: path /data/b.jpg is not of the form"),
        (changed(3, "x\\b.jpg,Wren,train"), ", row 3: path x\\b.jpg is not of the form"),
        (SIMPLE.replace(",", "|"), ": its first row 'path|label|split' is one column. Separate columns by commas, sem"),
        (changed(1, "picture,bird,split"), ": no column path (or file, filename, file_name, image, filepath) among pi"),
        (changed(1, "path,bird,split"), ": no column label (or class, class_name, species, species_name, category) am"),
        (SIMPLE.split("\n", 1)[1], ": no column path (or file, filename, file_name, image, filepath) among a.jpg, Tea"),
        (changed(1, "path,species,category"), ": columns species and category mean the same. Rename one to label."),
        (changed(3, ",,"), ", row 3: the row is empty. Delete it."),
        (changed(3, ""), ", row 3: the row is empty. Delete it."),
        (changed(3, "b.jpg, ,train"), ", row 3: b.jpg has no label. Fill it in or delete the row."),
        (changed(3, ",Wren,train"), ", row 3: the path is empty. Fill it in or delete the row."),
        (changed(3, "b.jpg,\u200b,train"), ", row 3: the class of b.jpg has no name ('\\u200b'). Give it one."),
        (changed(3, "b.jpg,Wren,tarin"), ", row 3: split 'tarin' is not train, test or val (or 1 for train, 0 for tes"),
        (changed(3, "b.jpg,Wren,"), ", row 3: split '' is not train, test or val"),
        (changed(3, "b.jpg,Wren,train,x"), ", row 3: 4 columns, and the first row has 3. Quote values with ',' in."),
        (changed(3, 'b.jpg,"Wren,train'), ", row 3: a quote is not closed, or not at the start or end of"),
        (changed(3, 'b.jpg,"Wren\nx.jpg,Wren",train'), ", row 3: a value goes on in the next row. Close its quotes"),
        ("path,label\n", ": it has no row below its column names. Give a row for each photograph."),
        ("path,label\n,\n,\n", ": it has no row below its column names."),
        ("", ": it is empty. Give a row for each photograph"),
        (SIMPLE.replace("path,label,split", "path,label,bb_x"), ": columns bb_x look like a part or another form of a"),
        ("path,label,x,y,width,height\na,T,1,2,3,4\n", ": columns x, y look like a part or another form of a box. Nam"),
        ("path,label,bbox\na,T,1\n", ": columns bbox look like a part or another form of a box"),
        (BOXES.replace("90,70,20,20", "90,70,x,20"), ", row 4: bb_width 'x' is not a number. Correct it."),
        (BOXES.replace("90,70,20,20", "90,70,,20"), ", row 4: the box of a.jpg is not four numbers (90.0, 70.0, None,"),
        (BOXES.replace("90,70,20,20", "90,70,inf,20"), ", row 4: the box of a.jpg is not four numbers"),
        (BOXES.replace("90,70,20,20", "100,70,20,20"), ", row 4: the box of a.jpg has no area in its 100x80 image."),
        (BOXES.replace("1,2,3,4", "1,2,0,4"), ", row 5: the box of b.jpg has no area in its image. Correct it."),
        ("path,label,bb_x,bb_y,bb_width,bb_height\na,T,.1,.1,.8,1\n", ", row 2: the boxes look like shares of the pho"),
        (BOXES.replace("a.jpg,Wren,train", "a.jpg,Wren,test"), ", row 2: a.jpg is in the train and in the test split."),
    ],
)  # fmt: skip
def test_mistakes_have_one_message(tmp_path, text, message):
    file = write(tmp_path, text)
    for named in (file, tmp_path):
        with pytest.raises(UserError, match="^" + re.escape(str(file) + message)) as error:
            read_archive(named)
        assert "\n" not in str(error.value)


def test_a_table_that_is_not_utf_8_is_named_with_its_row(tmp_path):
    (tmp_path / "birds.csv").write_bytes(SIMPLE.replace("Wren", "Rüppell").encode("latin1"))
    with pytest.raises(UserError, match="birds.csv, row 3: not UTF-8 text"):
        read_archive(tmp_path)
    (tmp_path / "birds.csv").write_bytes(SIMPLE.encode("utf-16"))
    with pytest.raises(UserError, match="birds.csv, row 1: not UTF-8 text"):
        read_archive(tmp_path / "birds.csv")


def test_damaged_and_nested_parquet_files_are_refused(tmp_path):
    file = tmp_path / "birds.parquet"
    pl.DataFrame({"path": ["a.jpg"], "label": [["Teal", "Wren"]]}).write_parquet(file)
    with pytest.raises(
        UserError, match=r"birds.parquet: column label holds List\(String\), not text or numbers. Give one"
    ):
        read_archive(file)
    pl.DataFrame({"path": ["a.jpg", "b.jpg"], "label": ["Teal", None]}).write_parquet(file)
    with pytest.raises(UserError, match="birds.parquet, row 2: b.jpg has no label"):
        read_archive(file)
    file.write_bytes(file.read_bytes()[:-9])
    for named in (file, tmp_path):
        with pytest.raises(UserError, match="birds.parquet: not a readable Parquet file"):
            read_archive(named)


def test_a_table_beside_class_folders_is_ambiguous_only_if_both_could_be_meant(tmp_path):
    for name in ("train/A", "train/B", "test/A"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(b"-")
    write(tmp_path, "class id,filepaths,labels\n0,train/A/1.jpg,A\n")
    archive = read_archive(tmp_path)
    assert archive.kind == "a folder for each class"
    assert archive.notes["files end in .csv and were left out, as no photographs"] == 1
    write(tmp_path, "path,label\ntrain/A/1.jpg,X\ntrain/B/1.jpg,Y\n")
    with pytest.raises(UserError, match="birds.csv and test/ could both say the classes. Name the file itself"):
        read_archive(tmp_path)
