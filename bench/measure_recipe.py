"""Measure the recipe: what each choice of `fast` is worth, and what all of them are together.

    python bench/measure_recipe.py --data <photos> [--part ablation 64 few] [--only <run> …]
                                   [--seeds 0 1 2] [--out results]

<photos> is the folder that holds imagenette2-160sq.

ablation: the way from the book's recipe to `fast`, made small: 32 pixels, 3 epochs, xresnet10 at
its beginning and `whitened_resnet24` at its end. "to-<change>" has all changes up to this one,
"book-plus-<change>" it alone, "fast-less-<change>" all others; "fast-plus-<change>" has one more,
which `fast` does without. 20 to 30 seconds a run on one core; results go to <out>/recipe-ablation.
64: `book` in fastai's own pipeline and `fast`, in turn, at 64 pixels and 5 epochs, in
<out>/recipe-64; 15 and 4 minutes.
few: 100 photos a class, `few` against the same number of epochs of plain training, in
<out>/recipe-few; about 20 and 8 minutes.

Seeds are on the outside: what is interrupted holds whole comparisons. What is there already isn't
done again, and an interrupted run goes on from its last epoch.
"""

from dataclasses import replace

from sota_course.baseline import ResidualPair
from sota_course.training.muon import muon
from sota_course.training.recipe_runs import RecipeRun
from sota_course.training.recipes import Recipe, preset
from torch import nn

from study import PHOTOS, Clock, photo_options

SMALL = dict(size=32, epochs=3)
BOOK = preset("book", arch="xresnet10", **SMALL)
# What leads from the one to the other, in this order. The figures stand here, since the preset may
# be tuned further: the ablation has a network and sizes of its own anyway.
CHANGES = {
    "small_resnet": dict(arch="small_resnet"),
    "whitening": dict(arch="whitened_resnet24"),
    "muon": dict(opt="muon", lr=0.05, wd=0.0),
    "triangle": dict(schedule="triangular"),
    "crops": dict(aug="crops", min_scale=0.5),
    "alternate": dict(flip="alternate"),
    "smoothing": dict(smoothing=0.1),
    "growing": dict(first_size=16),
}
# And what doesn't belong to `fast`
MORE = {
    "larger_crops": dict(min_scale=0.75),
    "batch32": dict(bs=32),
    "batch128": dict(bs=128),
    "adam": dict(opt="adam", lr=8e-3, wd=0.01),
    "sgd": dict(opt="sgd", lr=0.1, wd=5e-4),
    "ema": dict(ema=0.99),
    "lookahead": dict(lookahead=5),
    "mixup": dict(mixup=0.4),
    "cutmix": dict(cutmix=1.0),
    "decay": dict(wd=0.01),
}


def ladder():
    "The rungs from the book's recipe to `fast`, each with one change more."
    rungs, recipe = {"book": BOOK}, BOOK
    for name, changes in CHANGES.items():
        recipe = replace(recipe, **changes)
        rungs[f"to-{name}"] = recipe
    rungs["fast"] = rungs.pop(f"to-{name}")
    return rungs


FAST = ladder()["fast"]


def added():
    "The book's recipe with one of the changes."
    return {f"book-plus-{k}": replace(BOOK, **v) for k, v in CHANGES.items()}


def taken():
    "`fast` without one of the changes: without whitening it has the network before that."
    fewer = {}
    for name, changes in CHANGES.items():
        before = {k: getattr(BOOK, k) for k in changes}
        if name == "whitening":
            before = CHANGES["small_resnet"]
        fewer[f"fast-less-{name}"] = replace(FAST, **before)
    # `fast` without the small networks
    fewer["fast-less-network"] = fewer.pop("fast-less-small_resnet")
    return fewer


def stages(model):
    "The stages of a `whitened_resnet`: convolution, pooling, normalization, activation, pair."
    return [o for o in model if isinstance(o, nn.Sequential) and isinstance(o[-1], ResidualPair)]


def dirac(learn):
    "The first filters of each stage pass their input on."
    for o in stages(learn.model):
        weight = o[0].weight.data
        nn.init.dirac_(weight[: weight.shape[1]])


def pool_last(learn):
    "Pooling after normalization and activation."
    for o in stages(learn.model):
        o[1], o[2], o[3] = o[2], o[3], o[1]


def gelu(learn):
    "GELU in place of ReLU."
    for o in list(learn.model.modules()):
        for name, child in o.named_children():
            if isinstance(child, nn.ReLU):
                setattr(o, name, nn.GELU())


def _biases(model):
    "All parameters, and the biases of BatchNorm apart."
    norms = [o.bias for o in model.modules() if isinstance(o, nn.BatchNorm2d)]
    rest = [o for o in model.parameters() if all(o is not b for b in norms)]
    return [rest, norms]


def _quick_biases(params, lr):
    opt = muon(params, lr)
    opt.opt.param_groups[1]["rest_lr"] *= 4
    return opt


def quick_biases(learn):
    "Four times the learning rate for the biases of BatchNorm."
    learn.splitter, learn.opt_func = _biases, _quick_biases


# Changes of `fast` that a recipe has no name for
REBUILT = {
    "dirac": dirac,
    "pool_last": pool_last,
    "gelu": gelu,
    "quick_biases": quick_biases,
}


class RebuiltRun(RecipeRun):
    "A run whose learner is changed before it trains."

    def __init__(self, *args, rebuild=None, **kwargs):
        self.rebuild = rebuild
        super().__init__(*args, **kwargs)

    def new_learner(self):
        learn = super().new_learner()
        if self.rebuild:
            self.rebuild(learn)
        return learn


def _unlike(*groups):
    "The recipes of `groups` by name, without those that an earlier name has."
    found = {}
    for name, recipe in (o for group in groups for o in group.items()):
        if recipe not in found.values():
            found[name] = recipe
    return found


def ablation():
    "name -> recipe, in the order in which they are measured."
    more = {f"fast-plus-{k}": replace(FAST, **v) for k, v in MORE.items()}
    more |= dict.fromkeys((f"fast-plus-{o}" for o in REBUILT), FAST)
    return _unlike(ladder(), taken(), added()) | more


def at_64():
    return dict(book=preset("book", pipeline="fastai"), fast=preset("fast"))


def few():
    recipe = preset("few", per_class=100)
    plain = Recipe(per_class=100, epochs=recipe.epochs, arch="small_resnet", lr=8e-3)
    return dict(plain=plain, few=recipe)


PARTS = {"ablation": ablation, "64": at_64, "few": few}
BATCH = len(CHANGES) + 1  # the ladder is measured with all seeds before anything else


def in_turn(names, seeds):
    "Pairs of name and seed: the most important names first, all their seeds before the next."
    for start in range(0, len(names), BATCH):
        for seed in seeds:
            for name in names[start : start + BATCH]:
                yield name, seed


def run(data, out, part, name, seed):
    "The run of one recipe of `part` with one seed."
    recipe = PARTS[part]()[name]
    command = f"python bench/measure_recipe.py --data <photos> --part {part} --only {name}"
    return RebuiltRun(
        name,
        recipe,
        data,
        [seed],
        out / f"recipe-{part}",
        rebuild=REBUILT.get(name.removeprefix("fast-plus-")),
        command=f"{command} --seeds {seed}",
        progress=False,
    )


def main():
    parser = photo_options(__doc__)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS))
    add("--only", nargs="+", metavar="run", help="names, as the results have them; default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    known = {name for part in args.part for name in PARTS[part]()}
    if args.only and not known.issuperset(args.only):
        parser.error(f"--only has a run that isn't one of {', '.join(sorted(known))}")
    clock, data = Clock(), args.data / PHOTOS
    for part in args.part:
        names = [o for o in PARTS[part]() if not args.only or o in args.only]
        for name, seed in in_turn(names, args.seeds):
            clock.train(run(data, args.out, part, name, seed))


if __name__ == "__main__":
    main()
