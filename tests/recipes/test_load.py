"""Loading recipes: precedence, inheritance, and the messages for wrong fields."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tspipe.data import datasets
from tspipe.errors import RecipeError
from tspipe.models.networks import names as network_names
from tspipe.recipes import load
from tspipe.recipes.schema import Overrides, Teacher
from tspipe.training.arms import select_arms
from tspipe.training.optimizers import set_learning_rate


def error_message(*args, **kwargs) -> str:
    with pytest.raises(RecipeError) as error:
        load.load(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("name", load.names())
def test_every_recipe_loads(name):
    recipe = load.load(name, flags={"dataset": "cifar10"} if name in ("best", "strong") else None)
    assert recipe.dataset in datasets.names()
    for network in {*recipe.student, *recipe.students, recipe.teacher.network}:
        assert network in network_names() or network.startswith("torchvision:")
    assert recipe.preprocess.channels == len(recipe.preprocess.std) in (1, 3)


@pytest.mark.parametrize("name", datasets.names())
def test_every_dataset_has_a_recipe(name):
    assert load.default_recipe(name) == name


def test_default_recipe():
    assert load.default_recipe("folder:some/birds") == "folder"
    with pytest.raises(RecipeError) as error:
        load.default_recipe("./mine.py")
    assert str(error.value) == (
        f"There is no recipe for mine. Name one with --recipe: {', '.join(load.names())}, or a TOML file."
    )


def test_the_papers_cifar10():
    recipe = load.load("cifar10")
    assert (recipe.batch_size, recipe.random_images, recipe.epochs) == (128, 178, 200)
    settings = {name: recipe.optimisation(name) for name in ["lenet5", "alexnet", "mobilenet_v2", "resnet18"]}
    assert {name: values.lr for name, values in settings.items()} == {
        "lenet5": 1e-3,
        "alexnet": 1e-4,
        "mobilenet_v2": 1e-3,
        "resnet18": 1e-2,
    }
    assert {(s.optimizer, s.lr_drop_every, s.lr_drop_factor, s.weight_decay) for s in settings.values()} == {
        ("adam", 50, 0.1, 0.0)
    }


def test_the_papers_cub200():
    recipe = load.load("cub200")
    assert (recipe.batch_size, recipe.random_images, recipe.epochs) == (10, 0, 200)
    assert (recipe.preprocess.resize, recipe.preprocess.crop) == ((600, 600), 448)
    assert (recipe.lr, recipe.lr_drop_every) == (1e-3, 100)
    teacher = recipe.teacher
    assert (teacher.network, teacher.optimizer, teacher.batch_size, teacher.momentum) == ("ntsnet", "sgd", 16, 0.9)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    rates = []
    for epoch in range(teacher.epochs):
        set_learning_rate(optimizer, teacher, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3] * 60 + [1e-4] * 40 + [1e-5] * 40)


def test_overrides_flags_and_facts():
    overrides = ["lr=0.01", "teacher.network = resnet20", "students.lenet5.lr=3", "preprocess.mean=[0,0,0]"]
    recipe = load.load("cifar10", overrides, {"epochs": 3, "batch_size": None}, {"preprocess": {"crop": 28}})
    assert recipe.lr == 0.01
    assert recipe.teacher.network == "resnet20"
    assert recipe.optimisation("lenet5").lr == 3
    assert (recipe.preprocess.mean, recipe.preprocess.crop) == ((0, 0, 0), 28)
    assert (recipe.epochs, recipe.batch_size) == (3, 128)


def test_precedence_of_overrides_flags_and_facts():
    facts = {"preprocess": {"crop": 28}}
    assert load.load("cifar10", ["epochs=1"], {"epochs": 2}).epochs == 1
    assert load.load("cifar10", (), {"preprocess.crop": 24}, facts).preprocess.crop == 24
    assert load.load("cifar10", ["preprocess.crop=20"], {"preprocess.crop": 24}, facts).preprocess.crop == 20


def test_the_last_override_wins():
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
    recipe = load.load("cifar10", ["students.resnet18.options.stem=imagenet", "teacher.options.width=2"])
    assert recipe.student_options("resnet18") == {"stem": "imagenet"}
    assert recipe.student_options("lenet5") == {}
    assert recipe.teacher.options == {"width": 2}


def test_overrides_do_not_change_other_recipes():
    load.load("cifar10", ["teacher.options.width=2", "students.lenet5.lr=3"])
    recipe = load.load("cifar10")
    assert recipe.teacher.options == {}
    assert "lenet5" not in recipe.students


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "digits"\n[preprocess]\nmean = [0.5]\nstd = [0.5]\n')
    recipe = load.load(str(path), ["seeds=2"])
    assert (recipe.dataset, recipe.seeds, recipe.student) == ("digits", 2, ["lenet5"])


def test_unknown_recipe():
    assert error_message("cifar11") == (
        "Unknown recipe 'cifar11'. There are: cifar10, cifar100, table2_cifar10, best, cub200, digits, fashion_mnist, "
        "folder, strong, table1, table2_cifar100, table3."
    )


def test_a_missing_file(tmp_path):
    assert (
        error_message(f"{tmp_path}/x.toml")
        == f"The recipe {tmp_path}/x.toml cannot be read: No such file or directory."
    )


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.toml")
    assert (
        error_message(f"{tmp_path}/x.toml") == f"The recipe {tmp_path}/x.toml cannot be read: it is not a regular file."
    )


def test_bad_toml(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('dataset = "digits"\nlr = \n')
    assert error_message(str(path)) == f"The recipe {path} is not TOML: Invalid value (at line 2, column 6)."


@pytest.mark.parametrize(
    "override, message",
    [
        ("epoch=3", "The recipe digits has no field 'epoch'. Did you mean 'epochs'?"),
        ("qqqqqq=3", "The recipe digits has no field 'qqqqqq'. All are listed by: tspipe list settings"),
        ("teacher.netwrok=x", "The recipe digits has no field 'teacher.netwrok'. Did you mean 'teacher.network'?"),
        ("preprocess.crops=3", "The recipe digits has no field 'preprocess.crops'. Did you mean 'preprocess.crop'?"),
        (
            "students.lenet5.rl=3",
            "The recipe digits has no field 'students.lenet5.rl'. Did you mean 'students.lenet5.lr'?",
        ),
        ("flip=true", "The recipe digits has no field 'flip'. Did you mean 'teacher.flip' or 'views.flip'?"),
        ("techer.epochs=3", "The recipe digits has no field 'techer'. Did you mean 'teacher'?"),
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
        ("views.shfit=3", "The recipe digits has no field 'views.shfit'. Did you mean 'views.shift'?"),
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
def test_wrong_overrides(override, message):
    assert error_message("digits", [override]) == message


def test_a_missing_field(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[preprocess]\nmean = [0.5]\nstd = [0.5]\n")
    lacks = f"The recipe {path} lacks the field 'dataset'."
    assert error_message(str(path)) == f"{lacks} Put a dataset's recipe before it: cifar10,{path}"


def test_recipes_are_immutable():
    recipe = load.load("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.lr = 1.0


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_value_is_accepted_or_refused_in_one_line(value):
    for field in ["lr", "student", "teacher", "teacher.network", "preprocess.resize", "memory", "students.lenet5"]:
        try:
            load.load("digits", [f"{field}={json.dumps(value)}"])
        except RecipeError as error:
            assert "\n" not in str(error)


@given(st.text())
def test_any_override_is_accepted_or_refused(text):
    try:
        load.load("digits", [text])
    except RecipeError as error:
        assert str(error)


def test_a_single_student_needs_no_list():
    assert load.load("digits", ["student=alexnet"]).student == ["alexnet"]


def test_a_recipe_with_a_base(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "cifar10"\nepochs = 7\nstudents = {}\n[teacher]\nshift = 1\n')
    recipe, base = load.load(f"{tmp_path}/mine.toml"), load.load("cifar10")
    assert (recipe.epochs, recipe.teacher.shift, recipe.students) == (7, 1, {})
    assert recipe.teacher.lr_drop_every == base.teacher.lr_drop_every != Teacher().lr_drop_every
    assert recipe.preprocess == base.preprocess


def test_strong_is_based_on_the_recipe_of_the_dataset_or_of_a_table():
    strong = load.load("strong", flags={"dataset": "cifar100"})
    assert (strong.dataset, strong.teacher.network, strong.optimizer) == ("cifar100", "resnet56", "sgd")
    assert strong.optimisation("resnet18").lr == 0.1
    assert strong.optimisation("alexnet", alone=True) == strong.optimisation("alexnet")
    table = load.load("table3,strong")
    assert (table.paper.title, table.optimizer, table.alone) == ("Table 3", "sgd", Overrides())
    assert load.load("table3").alone != Overrides()


def test_best_is_based_on_any_recipe_and_has_the_baselines_of_mixing():
    for base in ("cifar10", "digits", "table1", "table3"):
        best = load.load(f"{base},best")
        assert (best.loss, best.schedule, best.epochs) == (["srrl"], "cosine", load.load(base).epochs)
        assert select_arms(True, best) == ("alone", "alone + random", "taught", "taught + random")
    assert (
        error_message("best")
        == "The recipe best lacks the field 'dataset'. Put a dataset's recipe before it: cifar10,best"
    )


def test_a_recipe_that_is_its_own_base(tmp_path):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(f'base = "{second}"')
    second.write_text(f'base = "{first}"')
    assert error_message(str(first)) == f"The recipe {second} is its own base."
    first.write_text('base = ["cifar10", "strong"]')
    assert error_message(str(first)) == f"The recipe {first} has a base that is not a name: ['cifar10', 'strong']."


def test_options_of_an_unknown_loss():
    message = error_message("digits", ["losses.kdd.temperature=2"])
    assert message.startswith("The recipe digits: Unknown loss 'kdd'. There are: kd, ")


def test_all_losses():
    names = load.load("digits", ["loss=all"]).loss
    assert {"ts", "kd", "dkd", "crd"} < set(names)
    assert "xent" not in names


def test_the_papers_tables():
    """The settings and results of arXiv 2005.00393 (Landro, Gallo and La Grassa), Tables 1 to 3."""
    for name, students, random_images in (("table1", 1, 100), ("table2_cifar10", 4, 178), ("table2_cifar100", 4, 178)):
        recipe = load.load(name)
        assert (recipe.epochs, recipe.batch_size) == (200, 128)
        assert (recipe.random_images, len(recipe.student)) == (random_images, students)
        assert set(recipe.paper.accuracy) == set(recipe.student)
        assert all(list(arms) == ["alone", "taught", "taught + random"] for arms in recipe.paper.accuracy.values())
    assert load.load("table2_cifar10").teacher.network == "resnet50"
    assert load.load("table3").paper.accuracy == {"mobilenet_v2": {"alone, own schedule": 0.425, "taught": 0.492}}
