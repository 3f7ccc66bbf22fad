import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tspipe.data import datasets
from tspipe.errors import RecipeError
from tspipe.models.networks import names as network_names
from tspipe.recipes import load
from tspipe.recipes import schema as recipe
from tspipe.training import optimizers as training


def refused(*args, **kwargs) -> str:
    """The whole message with which the recipe is refused."""
    with pytest.raises(RecipeError) as problem:
        load.load(*args, **kwargs)
    return str(problem.value)


@pytest.mark.parametrize("name", load.names())
def test_every_recipe_loads(name):
    chosen = load.load(name, flags={"dataset": "cifar10"} if name == "strong" else None)
    assert chosen.dataset in datasets.names()
    assert set(chosen.student) | set(chosen.students) | {chosen.teacher.network} <= set(network_names())
    assert chosen.preprocess.channels == len(chosen.preprocess.std) in (1, 3)


@pytest.mark.parametrize("name", datasets.names())
def test_every_dataset_has_a_recipe(name):
    assert load.default_recipe(name) == name


def test_recipe_of_a_dataset():
    assert load.default_recipe("folder:some/birds") == "folder"
    with pytest.raises(RecipeError) as problem:
        load.default_recipe("./mine.py")
    assert str(problem.value) == (
        f"There is no recipe for mine. Name one with --recipe: {', '.join(load.names())}, or a TOML file."
    )


def test_the_papers_cifar10():
    chosen = load.load("cifar10")
    assert (chosen.batch_size, chosen.random_images, chosen.epochs) == (128, 178, 200)
    fits = {name: chosen.optimisation(name) for name in ["lenet5", "alexnet", "mobilenet_v2", "resnet18"]}
    assert {name: fit.lr for name, fit in fits.items()} == {
        "lenet5": 1e-3,
        "alexnet": 1e-4,
        "mobilenet_v2": 1e-3,
        "resnet18": 1e-2,
    }
    assert {(fit.optimizer, fit.lr_drop_every, fit.lr_drop_factor, fit.weight_decay) for fit in fits.values()} == {
        ("adam", 50, 0.1, 0.0)
    }


def test_the_papers_cub200():
    chosen = load.load("cub200")
    assert (chosen.batch_size, chosen.random_images, chosen.epochs) == (10, 0, 200)
    assert (chosen.preprocess.resize, chosen.preprocess.crop) == ((600, 600), 448)
    assert (chosen.lr, chosen.lr_drop_every) == (1e-3, 100)
    teacher = chosen.teacher
    assert (teacher.network, teacher.optimizer, teacher.batch_size, teacher.momentum) == ("ntsnet", "sgd", 16, 0.9)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    rates = []
    for epoch in range(teacher.epochs):
        training.set_learning_rate(optimizer, teacher, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3] * 60 + [1e-4] * 40 + [1e-5] * 40)


def test_overrides_flags_and_facts():
    overrides = ["lr=0.01", "teacher.network = resnet20", "students.lenet5.lr=3", "preprocess.mean=[0,0,0]"]
    chosen = load.load("cifar10", overrides, {"epochs": 3, "batch_size": None}, {"preprocess": {"crop": 28}})
    assert chosen.lr == 0.01
    assert chosen.teacher.network == "resnet20"
    assert chosen.optimisation("lenet5").lr == 3
    assert (chosen.preprocess.mean, chosen.preprocess.crop) == ((0, 0, 0), 28)
    assert (chosen.epochs, chosen.batch_size) == (3, 128)


def test_overrides_go_before_flags_and_flags_before_facts():
    facts = {"preprocess": {"crop": 28}}
    assert load.load("cifar10", ["epochs=1"], {"epochs": 2}).epochs == 1
    assert load.load("cifar10", (), {"preprocess.crop": 24}, facts).preprocess.crop == 24
    assert load.load("cifar10", ["preprocess.crop=20"], {"preprocess.crop": 24}, facts).preprocess.crop == 20


def test_the_last_override_counts():
    assert load.load("cifar10", ["lr=1", "lr=2"]).lr == 2


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_none(text):
    assert load.load("digits").preprocess.resize == (16, 16)
    assert load.load("digits", [f"preprocess.resize={text}"]).preprocess.resize is None
    assert load.load("digits", [f"memory={text}"]).memory is None


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("false", False), ("False", False)])
def test_true_and_false(text, value):
    assert load.load("digits", [f"teacher.flip={text}"]).teacher.flip is value


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("1GiB", 2**30), ("4096", 4096)])
def test_memory_in_units(text, size):
    assert load.load("digits", [f"memory={text}"]).memory == size


def test_options_of_networks():
    chosen = load.load("cifar10", ["students.resnet18.options.stem=imagenet", "teacher.options.width=2"])
    assert chosen.student_options("resnet18") == {"stem": "imagenet"}
    assert chosen.student_options("lenet5") == {}
    assert chosen.teacher.options == {"width": 2}


def test_recipes_do_not_share_what_is_overridden():
    load.load("cifar10", ["teacher.options.width=2", "students.lenet5.lr=3"])
    chosen = load.load("cifar10")
    assert chosen.teacher.options == {}
    assert "lenet5" not in chosen.students


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "digits"\n[preprocess]\nmean = [0.5]\nstd = [0.5]\n')
    chosen = load.load(str(path), ["seeds=2"])
    assert (chosen.dataset, chosen.seeds, chosen.student) == ("digits", 2, ["lenet5"])


def test_unknown_recipe():
    assert refused("cifar11") == (
        "Unknown recipe 'cifar11'. There are: cifar10, cifar100, table2_cifar10, cub200, digits, fashion_mnist, "
        "folder, strong, table1, table2_cifar100, table3."
    )


def test_file_that_is_not_there(tmp_path):
    assert refused(f"{tmp_path}/x.toml") == f"The recipe {tmp_path}/x.toml cannot be read: No such file or directory."


def test_bad_toml(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('dataset = "digits"\nlr = \n')
    assert refused(str(path)) == f"The recipe {path} is not TOML: Invalid value (at line 2, column 6)."


@pytest.mark.parametrize(
    "override, message",
    [
        ("epoch=3", "The recipe digits has no field 'epoch'. Did you mean 'epochs'?"),
        ("qqqqqq=3", "The recipe digits has no field 'qqqqqq'."),
        ("teacher.netwrok=x", "The recipe digits has no field 'teacher.netwrok'. Did you mean 'network'?"),
        ("preprocess.crops=3", "The recipe digits has no field 'preprocess.crops'. Did you mean 'crop'?"),
        ("students.lenet5.rl=3", "The recipe digits has no field 'students.lenet5.rl'. Did you mean 'lr'?"),
        (
            "epochs=many",
            'The recipe digits: epochs cannot be "many": '
            "input should be a valid integer, unable to parse string as an integer.",
        ),
        (
            "epochs=1.5",
            "The recipe digits: epochs cannot be 1.5: "
            "input should be a valid integer, got a number with a fractional part.",
        ),
        ("epochs=0", "The recipe digits: epochs cannot be 0: input should be greater than or equal to 1."),
        ("lr=-1", "The recipe digits: lr cannot be -1: input should be greater than 0."),
        ("teacher.momentum=1", "The recipe digits: teacher.momentum cannot be 1: input should be less than 1."),
        (
            "features.dtype=float64",
            "The recipe digits: features.dtype cannot be \"float64\": input should be 'float16' or 'float32'.",
        ),
        (
            "student=[]",
            "The recipe digits: student cannot be []: list should have at least 1 item after validation, not 0.",
        ),
        (
            "students.lenet5=3",
            "The recipe digits: students.lenet5 cannot be 3: "
            "input should be a valid dictionary or instance of Student.",
        ),
        *(
            (
                f"views={views}",
                "The recipe digits: views: there is nothing to draw, since the first view is the plain image. Give a "
                "count of 2 or more (0: no views), and a shift, or flip=true.",
            )
            for views in ('{"count": 1}', '{"count": 4, "shift": 0, "flip": false}')
        ),
        ("views.count=-1", "The recipe digits: views.count cannot be -1: input should be greater than or equal to 0."),
        ("views.shfit=3", "The recipe digits has no field 'views.shfit'. Did you mean 'shift'?"),
        ("student=3", "The recipe digits: student cannot be 3: input should be a valid list."),
        ("student=[3]", "The recipe digits: student.0 cannot be 3: input should be a valid string."),
        ("lr", "--set lr: write it as field=value, for example --set lr=0.01"),
        ("epochs.x=1", "--set epochs.x: 'epochs' is a single value, not a section."),
        ("lr.x=1", 'The recipe digits: lr cannot be {"x": 1}: input should be a valid number.'),
        (
            "preprocess.mean=[0.1,0.2]",
            "The recipe digits: preprocess: mean has 2 channels, std has 1.",
        ),
    ],
)
def test_override_that_makes_no_sense(override, message):
    assert refused("digits", [override]) == message


def test_field_that_is_missing(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[preprocess]\nmean = [0.5]\nstd = [0.5]\n")
    assert refused(str(path)) == (f"The recipe {path} lacks the field 'dataset'.")


def test_recipes_are_immutable():
    chosen = load.load("digits")
    with pytest.raises(ValueError, match="frozen"):
        chosen.lr = 1.0


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_value_is_taken_or_refused_in_a_sentence(value):
    for field in ["lr", "student", "teacher", "teacher.network", "preprocess.resize", "memory", "students.lenet5"]:
        try:
            load.load("digits", [f"{field}={json.dumps(value)}"])
        except RecipeError as problem:
            assert "\n" not in str(problem)


@given(st.text())
def test_any_override_is_taken_or_refused(text):
    try:
        load.load("digits", [text])
    except RecipeError as problem:
        assert str(problem)


def test_one_student_may_stand_alone():
    assert load.load("digits", ["student=alexnet"]).student == ["alexnet"]


def test_a_recipe_upon_another(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "cifar10"\nepochs = 7\nstudents = {}\n[teacher]\nshift = 1\n')
    found, under = load.load(f"{tmp_path}/mine.toml"), load.load("cifar10")
    assert (found.epochs, found.teacher.shift, found.students) == (7, 1, {})
    assert found.teacher.lr_drop_every == under.teacher.lr_drop_every != recipe.Teacher().lr_drop_every
    assert found.preprocess == under.preprocess


def test_strong_lies_upon_the_recipe_of_the_dataset_or_of_a_table():
    strong = load.load("strong", flags={"dataset": "cifar100"})
    assert (strong.dataset, strong.teacher.network, strong.optimizer) == ("cifar100", "resnet56", "sgd")
    assert strong.optimisation("resnet18").lr == 0.1
    assert strong.optimisation("alexnet", alone=True) == strong.optimisation("alexnet")
    table = load.load("table3,strong")
    assert (table.paper.title, table.optimizer, table.alone) == ("Table 3", "sgd", recipe.Overrides())
    assert load.load("table3").alone != recipe.Overrides()


def test_a_recipe_that_is_its_own_base(tmp_path):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'base = "{two}"')
    two.write_text(f'base = "{one}"')
    assert refused(str(one)) == f"The recipe {two} is its own base."
    one.write_text('base = ["cifar10", "strong"]')
    assert refused(str(one)) == f"The recipe {one} has a base that is no name: ['cifar10', 'strong']."


def test_options_of_a_loss_that_there_is_not():
    assert refused("digits", ["losses.KD.temperature=2"]) == (
        "The recipe digits: Unknown loss 'KD'. There are: kd, ts, vid, xent."
    )


def test_the_papers_tables():
    """Landro, Gallo and La Grassa, arXiv 2005.00393: the differences that the text of the paper makes of its tables."""
    for name, students, random in (("table1", 1, 100), ("table2_cifar10", 4, 178), ("table2_cifar100", 4, 178)):
        found = load.load(name)
        assert (found.epochs, found.batch_size, found.random_images, len(found.student)) == (200, 128, random, students)
        assert set(found.paper.accuracy) == set(found.student)
        assert all(list(arms) == ["alone", "taught", "taught + random"] for arms in found.paper.accuracy.values())
    assert load.load("table2_cifar10").teacher.network == "resnet50"
    assert load.load("table3").paper.accuracy == {"mobilenet_v2": {"alone, own schedule": 0.425, "taught": 0.492}}
