"""Write docs/results.md and the README's table of figures from finished runs, so that none is typed by hand.

python docs/make_results.py [RUN_OR_FOLDER_OF_RUNS ...]

What the tables need of each run folder is kept in docs/data/runs, or docs/data/demo for those on the demo data, so that
a new run does not need the folders of the old ones: a run of the same name replaces its record, the others stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from recipes.cli import discover
from recipes.pipeline.files import read_settings, run_folders, write_text
from recipes.pipeline.report import repeat_command
from recipes.pipeline.results import NOT_RUN, Results, markdown, record_of

HERE = Path(__file__).parent
RECORDS = HERE / "data"
README = HERE.parent / "README.md"
FIGURES = re.compile(
    r"(?<=<!-- figures: written by docs/make_results.py -->\n).*(?=<!-- end of figures -->)", re.DOTALL
)
TITLE = """# Results

Of all systems, on photographs and on the built-in demo data, both written by `docs/make_results.py` from finished
runs; `python -m recipes sweep all` makes such runs and a page like this one of them. A system that was not run says so.
"""
PHOTOGRAPHS = """## On photographs

Measured by `recipes` on real PASCAL VOC 2012 photographs, preset `small`: 1,523 images with a cat, cow, dog, horse
or sheep (people too), scaled to 400 pixels, classes cat, cow, dog, horse, person, sheep; pixels of VOC's other
classes count as background, 255 is left out. 1,303 images train, with their image tags only; seeds and masks are
measured on those 378 of them that are in VOC's own train list and so have hand-made masks, the segmentation on 220
images of VOC's val list. The names are in [data/voc12_animals](data/voc12_animals), so whoever has VOC 2012 can
repeat the table (`--train-list`, `--seed-list`, `--val-list`).

mIoU is in percent, over background and six classes, from one confusion matrix over the split. *Seed*: the CAM against
a constant background score. *Mask*: after the method's refinement (for `cam` there is none). *+ CRF*: masks after the
dense CRF, with IRN's settings unless the paper has its own; most recipes train the segmentation network (DeepLabV3+,
EfficientNet-Lite0) on these, tested over three scales and mirror images, without CRF. Thresholds are fixed: 0.25 for
seeds (it was the best in an earlier trial on these photographs, see the oracle for what that is worth), 0.25 after
IRN's walk as published; RW's background score walks along and needs none. In brackets, the oracle: the best
threshold, found with the ground truth of the same split. No checkpoint was chosen on pixel labels: each run takes its
last step. A dash is a stage that was not run.

The runs shared their two cores with tests and other work, so that times by the clock are upper bounds, up to four
times those of a free machine; the processor's are what a run costs, without what it took over from another run. A run
that continues another's classifier counts its time by the clock too. Runs with `-t2` in their name, those that stand
on them and `irn-s1` had two torch threads; the others had one. The same seed with another number of threads
rounds differently and ends elsewhere (`cam`, seed 0: 52.0 and 53.1), and so does the same command with later code
(seed 1: `cam-s1` 53.3, `cam-c1` 52.8): differences of a point are noise, and a system should be compared with the
`cam` that it stands on, which the notes below the table name.
"""

PHOTOGRAPHS_REMARKS = """\
`rw` and `irn` lift the plain CAMs above what the dense CRF alone gives them, with either random seed. RW's masks are
better than IRN's here, the reverse of what was published with larger backbones. Two differences may explain it: RW
fine-tunes the backbone of its affinity network, and starts it from the classifier, while IRN's stays frozen under
heads that take 243 steps (the published schedule has 990) at the released momentum of 1e-4; and RW's background
competes in the walk, while IRN's is a constant that was fixed for ResNet-50. Neither was tested by itself. And RW's
masks hang on the classifier more than its maps tell: `rw-s0` stands on `cam-s0-t2` and is at 72.8, `rw-c0` on `cam-s0`,
with the same seed, settings and code, and is at 65.5, though the maps of the latter are the better ones (53.1 against
52.0). What is lost is lost on people (IoU 43 to 31) and sheep (77 to 65), whose maps cover more beside them. A row that
stands on RW's walk should be compared with 65.5, and a difference of a few points between single runs means little.

Of the systems that train the classifier differently, all on the same backbone, crops and five epochs of tags:

- `recam` fine-tunes the classifier of `cam-s0-t2` for four more epochs. Its maps are better than the plain ones on both
  lists, and so are the masks that IRN makes of them (at ReCAM's thresholds for confident areas and walk). No plain
  classifier was trained for nine epochs to tell how much of that is the longer training.
- `wood` fine-tunes for two more epochs, with 95 photographs from COCO without any of the classes as its
  out-of-distribution images: with seed 0 54.4 and 52.3 on train and val against 53.1 and 51.8 of `cam-s0`, with seed 1
  53.4 and 52.4 against 53.2 and 51.3 of `cam-s1`; an earlier run with the same settings had 52.8 and 52.7 against 52.0
  and 50.7 of `cam-s0-t2`. The gain is in the same direction each time, 0.2 to 2 points, about the size of the noise.
  Refined by IRN its masks are at 67.1, between those that IRN makes of the plain CAMs (65.4 and 67.4).
- `c2am` leaves the CAMs as they are and replaces the constant background score by a cue that a second network learns
  without labels. That network keeps the backbone of the classifier as it is and learns one map on it, in 100 steps of
  64 images. With ImageNet's weights in place of the classifier's (and the last stages learning) the cue agreed with
  the masks at 67.8 mIoU over object and background, and the masks made with it at 52.3: ImageNet has no class for
  people, who were mostly left out (IoU 9). With the classifier's it is 79.1, and the masks are at 67.3, fourteen
  points above the maps that they are made of, without an affinity network. With seed 1 it is at 77.4 and the masks at
  65.6, thirteen points above theirs; the segmentation network trained on them is at 60.3 on val, where that of the
  plain CAMs after a CRF, `cam-c1`, is at 54.0. The cue has been through the dense CRF, so that a second one adds
  nothing. People stay the weakest class (IoU 32 and 31, recall 42 and 39).
- `rca` needs saliency and was given that of `c2am-s0`, so its row is not image tags alone. Its maps are the maximum
  over the epochs of one view of 224 pixels, without scales and mirror images, and cover too much: their best threshold
  (0.46) is far above the fixed one, and even there they are below the plain CAM. Cut out by the saliency they give
  masks of 65.6, of which the saliency has most of the merit: the plain CAM cut out by the same one is at 67.3
  (`c2am-s0`). With the earlier saliency, which left people out, they were at 50.1. Masks leave some pixels undecided,
  which count as wrong.
- `spatial_bce` does not reach the plain CAM, but no longer gives up whole classes (seed 25.2, with no cow, dog and
  horse at all): the divergence from the prior now weighs as much as with 20 classes, the trunk learns ten times as
  fast, and so does the branch of the thresholds. Its masks are precise and timid (precision 82 to 92 % for cat, dog,
  horse and sheep at a recall of 33 to 56), and cows are hardly found: probabilities of tagged cows have a mean of 0.03
  and a maximum of 0.28 on average, where the prior asks for 15 % of the image. A quarter of the tagged classes have an
  empty mask after the first phase, 2 % had one before. That such classes now keep their earlier prior in the second
  phase, in place of being told 1 %, changed nothing (mask 42.9 before): what is lost is lost in the first phase. The
  likely reason, not tested, is that a pixel near its threshold is hardly moved, which holds for all pixels of a class
  that starts low, while five of six images push its scores down. A phase has 243 steps here, 17,600 as published;
  longer ones were not tried. (The first phase had a weight of 3.3333 on the divergence, the second the preset's 3.3.)
- `aeft` starts as the classifier of `cam-s0` and covers more of the objects than it (recall of cats 91 % against 74,
  of dogs 68 against 60, of every class at least as high), and more of what is beside them: at the fixed threshold it
  is two points below the plain CAM, at the best one (0.33) one point. Its own threshold in the paper is searched on
  the masks of the training images. Starting from ImageNet, with cells of 32 pixels, it had 43.0. The walk (at AEFT's
  exponents, 2 and 21 for the confident areas, 19 for the background that walks along) makes 61.2 of them, 4 below
  what RW makes of the plain CAMs of `cam-s0`, by spreading too far: recall of cats, dogs and people 97, 90 and 85 %
  at a precision of 54, 57 and 33 %. A weaker exponent of the background was not tried, since only masks could tell.
- `occse` ends below the classifier that judges it with seed 0 (51.6 and 48.6 on train and val against 53.1 and 51.8;
  recall of cows and dogs 55 and 51 % against 65 and 60) and above it with seed 1 (54.4 and 51.5 against 53.2 and
  51.3): no gain that stands out of the noise. The judge's loss ended at 0.6 (seed 0), which says that the classes
  erased were mostly still seen; 405 steps are a fiftieth of the published 20,000, at higher learning rates. Whether
  that is the reason was not tested. The walk (with OC-CSE's backgrounds for the confident areas) spreads what the
  maps have and leaves what they lack: 61.7, where RW makes 65.5 of the plain CAMs of `cam-s0`, most of it lost on
  dogs (recall 51 %) and cows (58 %).
- `ppc`, on SEAM, has the best maps of those from tags alone, 59.0 and 59.2 on train and val, and its published constant
  (0.26) is nearly the best (0.32 and 0.29). How much of the gain is SEAM's and how much the contrast's was not tested;
  its cells have 16 pixels where those of `cam` have 32. RW's walk, at PPC's exponents (4 and 24 for the confident
  areas, 16 for the background that walks along), makes 62.6 of them, less than of the plain CAMs (65.5): recall rises
  from 80 to 88 %, precision stays at 69, so the walk spreads beyond objects that the maps cover already.
- `sipe` has maps of 57.3 and 57.0, four points above the plain CAM, with the background that it makes itself: their
  class is the argmax, without a threshold. With the weight of 0.5 that the released code gives to the background
  where seeds are found it was at 35.9 and 37.8: most of the background became objects (recall 41 % on 42 photographs).
  The overlaps that this weight was fixed for are those of a ResNet-50 and 20 classes; here the background counts like a
  class. That default was chosen on masks of these photographs, as the 0.25 of `cam` once was. IRN's walk, in which this
  background walks along, makes 70.9 of them and the CRF 72.5 (of the plain CAMs 65.4 and 67.4, 66.2 and 68.7). The
  segmentation network trained on these is at 62.0 on val, where that of the plain CAMs is at 55.5 (`cam-s0-t2`).
- `mctformer` has four blocks of random weights behind the pretrained network, read as a hybrid: its maps are those of
  patches, smoothed by the attention between them, and a point below the plain CAM. Smoothing gains two points over the
  patches' own maps (42 photographs, each at its best threshold: 54.1 and 51.9), but broadens them, so that the
  published background, 0.39, which belongs to the product with the tokens' attention, left them at 46.3 and the masks
  at 52.8; the background is 0.6 here, seen on masks, like that of `cam`. The maps of the class tokens alone were at 37,
  and the product at 52, at their best: 405 steps are few to learn where to look. With a pretrained DeiT, which this
  comparison can't have, that may be otherwise. Its walk makes 63.3 of them, RW's 65.5 of the plain CAMs. (The maps were
  written under the first background, in 1,176 s that the table lacks, and measured again.)
- `vitpcm` takes the likeliest class of each patch, and is timid: precision 84 to 96 % for all animals, at a recall of
  33 to 48, which a CRF lowers further. At a threshold of 0.14 its maps would be at 52.6, near the plain CAM,
  and on val at 53.9, above it; but a threshold is not part of the method. Only the surest patch of a class learns from
  a tag, and 405 steps on new layers do not spread that over the object, as they did not on the demo data.
- `eps` has the best maps without boxes, 61.0 and 60.8 on train and val (62.2 and 61.4 at their best thresholds), and
  masks of 69.5 after a CRF, which adds eight points and is its only refinement. It needs saliency, here that of
  `c2am-s0`, which learns without labels; the plain CAM cut out by the same one is at 67.3 (`c2am-s0`). Its maps
  themselves need no saliency, once it is trained. The segmentation network learns from the masks without a CRF, as
  published: 58.0, where that of `cam-s0-t2`, which has CRF masks of 59.0, is at 55.5.
- `l2g` starts both of its networks as the classifier of `cam-s0` or, with seed 1, `cam-c1`, and has the saliency of
  `c2am` with the same seed. Its maps are at 53.4 and 53.1 on train and val with seed 0, at 51.5 and 48.9 with seed 1
  (plain 53.1 and 51.8, 52.8 and 52.1); a CRF takes them to 57.3 and 52.3, the plain ones to 59.0 and 60.1, and the
  segmentation network of seed 1 is at 45.5, that of `cam-c1` at 54.0. With seed 0 they are better than the plain ones
  on people (IoU 44, plain 34), cats and dogs, whose outlines come from the saliency, and worse on cows and sheep (40
  and 40, plain 48 and 54), at precisions of 53 and 47 %. With seed 1 they are right (precision 83 to 94 % on the
  animals) and low, so that the constant background of 0.25 takes half of them (recall 43 to 67 %); at 0.10 and 0.09
  they would be at 60.2 and 57.1, better than any plain map, while those of seed 0 gain nothing from another
  threshold. So there are good maps in it whose height is not held: the network that sees whole views hears of the
  tags through the other one's maps alone, and its own loss on them, which is watched and not trained, rose to 0.5 and
  0.4 from 0.06 and 0.03. Whether more than the 486 steps, of 35,000 published ones, would hold it was not tried.
- `nsrom` needs saliency, here that of `c2am-s0`. The attention that its second classifier learns is broader than the
  plain maps (39.9 and 39.3 on train and val, 45.4 and 42.8 at the best thresholds, 0.55 and 0.5), and so is the first
  one's before it was accumulated (44.6): both see the image as one square of 224 pixels, at one scale, and the
  accumulation keeps the largest value of all epochs. The labels take objects only where attention and saliency agree,
  and so are precise (87 to 93 % for all animals) and at 62.4, with 11 % of the pixels left open, which count as wrong;
  the plain CAM cut out by the same saliency is at 67.3 (`c2am-s0`). The first segmentation network trained on them sees
  the training images at 69.6 after a CRF, as good as EPS' masks of the same saliency; what lies far from objects is
  then left open in images of several classes, which makes 68.0 of them. The second network was not trained.
- `clims` has no CLIP here: its critic is the ImageNet classifier itself, whose likeliest labels stand for their words'
  sentence embeddings (`--critic.model conse`). That critic tells little: whole photographs match the texts of their
  tags at 0.38 and those of other classes at 0.27. Under it the maps of animals grow until they take in what is beside
  them (recall of cats, dogs and sheep 99, 92 and 94 % at a precision of 33 to 42), and people, for whom ImageNet has no
  label, are lost (recall 21 %, from 86): 34.2 and 33.3 on train and val at the published background of 0.15. At the
  best one, 0.45, they would be at 45.5, still below the plain 53.1. With a CLIP, which this comparison can't have, that
  may be otherwise; whether more than 162 steps would help was not tried. IRN's walk makes 36.1 of them and the CRF 36.4
  (of the plain CAMs 65.4 and 67.4, 66.2 and 68.7): from maps that cover too much it keeps what they cover (precision of
  cats and dogs 32 and 36 % after it).
- `advcam` climbs for eight steps at two scales of 288 pixels and of half that, where the plain maps are of three scales
  up to the image's own half again. At the plain maps' background, 0.25, it takes in most of the image (36.4 and 38.1 on
  train and val; recall of cats, people and sheep 94 to 98 % at a precision of 17 to 43); at the best one, 0.63 and
  0.62, it is at 50.7 and 50.8, below the 53.1 and 51.8 of the plain maps. Each step makes the maps fuller (on 48 of the
  photographs one, two, four and eight are at 39.8, 38.2, 34.8 and 33.3 at 0.25). The climb itself helps: there one
  step, which is the plain map of these two scales, is at 44.2 at its best threshold, two, four and eight steps at 45.9,
  46.5 and 47.0, and the maps of `cam-s0` at 47.5. So what it lacks is likely resolution, which costs a step forward and
  back for each class. IRN's walk, with confident areas for fuller maps (0.35 and 0.15), makes 45.1 of them and the CRF
  46.5 (of the plain CAMs 65.4 and 67.4, 66.2 and 68.7), with nearly all of the objects (recall 81 to 99 %) and too much
  beside them.
- `bana` is supervised by boxes, made from the masks (`--boxes components_of_masks`), so its row is not image tags. Its
  class maps are cut to the boxes and so precise: 64.9 and 63.4 at 0.25, 73.2 on both lists at the best threshold, 0.07.
  Labels by retrieval are at 77.5, and those of the CRF, whose unary terms are the background's attention and the maps,
  at 84.0, the best masks here. Its segmentation network, which trusts both where they agree, is at 66.7 on val, where
  that of `cam-s0-t2`, whose masks are at 59.0, is at 55.5; at the five times higher rates of the other recipes its
  cosines, times 20, did not train (1.6).
- `bbam` is supervised by boxes, made from the masks (`--boxes components_of_masks`), so its row is not image tags.
  Its maps are the least that the detector needs of an object, and so small: precise and timid at 0.25 (68 to 79 % of
  what they say is right on train, at a recall of 28 to 53 %), and at 62.5 and 58.0 on train and val at the best
  threshold, 0.01, which takes nearly every cell that was kept. 643 of the 2,462 objects have no map, since the
  detector finds their class and box from no proposal; their masks come from degrees of the box and the CRF. Before
  the CRF a strict mask is 15 % of its box, and what only the loose one has is left open (12 % of the pixels), which
  counts as wrong: 29.8. The CRF, a part of the method, makes 71.6 of them, between the labels of `bana` from the same
  boxes (84.0) and the plain CAMs (59.7). The segmentation network is at 62.5 on val (`bana` 66.7, `cam-s0-t2` 55.5),
  instances are at 66.2 AP at an overlap of a half and 16.9 at three quarters, on the 165 val images whose boxes tell
  them apart. Maps take 20 of the 300 published steps and see squares of 224 pixels; more were not tried.
- `reviewkd` has no published setting for segmentation; here the teacher is the segmentation network of the other
  recipes, trained on the plain CAMs after a CRF (60.3 on train, with seed 1 60.1), and is at 55.3 and 54.0 on val.
  The student has a quarter of its weights (0.78 million of 3.86: the same encoder without its last stages, a decoder
  of 64 channels) and learns from the same masks in the same 324 steps. Alone it is at 35.1 and 39.3, under the
  teacher at 41.2 and 41.0: six points better with seed 0, on every class and most on dogs (20 to 31) and cows (14 to
  22), not quite two with seed 1, on cows (25 to 31) and people (33 to 38) and hardly elsewhere. So the distillation
  helps it, the more the worse it is alone, and leaves it far below its teacher; whether more steps, which a student
  whose layers all learn may want, would close the gap or lessen the gain was not tried. (Of the time of the teacher
  of seed 0 the table has only what it took after an interruption.)
- `afa` is the same hybrid trained with affinities: its CAMs are at 55.1 and 52.6 on train and val with seed 0, at
  55.4 and 53.5 with seed 1, two points and more above the plain ones on train (`cam-s0` 53.1, `cam-c1` 52.8) and one
  on val, at a threshold (0.45) that is 0.1 to 1.5 points below the best. They cover the objects (recall of cats 95
  and 91 %, of people 80 and 77) and too much beside them (precision of cats 56 and 62 %, of people 38 and 48). What
  is done with them then does not cut that off: one step along the affinity and PAR make 55.6 and 53.1 of them, with
  more recall and less precision, and the CRF 57.3 and 55.1, where the CRF alone makes 59.0 and 60.1 of the plain
  CAMs, which are the narrower ones. The affinity is learnt by blocks that began with random weights; the paper's
  began with ImageNet's. Its decoder, which learns from these labels as they come, is at 50.7 and 51.9 on val, below
  the segmentation networks of the plain CAMs (54.0 to 56.0 over the runs).
- `edam` needs saliency, here that of `c2am-s0`. Its maps are the broadest of all (33.9; 38.4 at their best threshold,
  0.67): pairs of images ask only whether both show a class, and a mask that takes in more answers that no worse. Cut
  out by the saliency they are at 67.2, precise (85 %) like the saliency, which has the merit: the plain CAM cut out by
  the same one is at 67.3 (`c2am-s0`). The CRF before that cut, as published, makes the broad maps certain, which then
  overrule the saliency (50.1); the recipe's labels are those without it. (Since this run, the transformers' biases no
  longer learn at twice the rate.)
"""

DEMO = """## On the demo data

Drawn pictures of 96 to 128 pixels, made on first use: 240 train, with their tags, and 80 validate. All of the 240 have
masks, on which seeds and masks are measured. Preset `demo`, which takes minutes on two cores. The pictures have what
makes the task hard (a telling part on a body shared with other classes, grounds that go with a class) and nothing of
what photographs have besides, so that the order of systems need not be that of photographs. Most trainings have 75 to
120 steps, so that the table shows more of how a system bears a short training than of how good it is. Seeds 0, 1 and
2, and the constants of the papers unless said. Seeds differ much: masks of `clims` by 26 points after the CRF, of
`vitpcm` by 16. Runs of one seed were made on two machines that round differently (`cam`, seed 0: 50.5 and 50.2 after
the CRF). Figures in the remarks are those of seed 0 unless said.
"""

DEMO_REMARKS = """\
What rows below the plain CAM have in common, and more:

- Maps that are too broad for their constant. `ppc` finds 92 % of the objects' pixels, and of the background 23: at
  its best threshold, 0.56, the seeds would be at 44.2, and the refinement learns from areas that the published
  constants call confident. So it was with `sipe` under the released weight of its background (seed 32.8, mask 36.5),
  before that counted like a class. `occse` and, with seed 0, `vitpcm` are too timid instead (52 and 47 % of the
  objects); the walk of the former takes still more away.
- `rw` and `irn` have the maps of `cam`. IRN's walk gains four points over them (48.4), but ends where the dense CRF
  alone does (50.5); RW's takes object away (recall 62.8 to 57.2 % at the same precision), which is unlike
  photographs, where both gain more than ten. A walk has few cells in pictures of this size, and 90 steps to learn its
  affinity; which of the two it is was not tested. The maps of `aeft` are a little better than the plain ones with
  seed 0, worse with the others, and lose by the same walk (recall 65.5 to 61.1 %).
- `wood` is above the plain CAM with seed 0 and below it with the others (its segmentation 48.8, 37.8 and 43.5, the
  plain ones 46.4, 44.8 and 48.7). Its masks are precise and small, which the segmentation network deepens: precision
  65 to 98 % for cows, foxes and rams at a recall of 23 to 34, where the plain one finds 32 to 53. The fine-tuning has
  30 steps here; it was not looked into which of its terms takes object away.
- `spatial_bce` is timid here too: with 57 % of the objects its masks are as precise as the plain ones (58 %), which
  have 63, and the CRF takes four more away. Each of its two phases has 45 steps; what holds them back on photographs,
  above, was not looked into here.
- Blocks that start from random weights (`mctformer`, `afa`, `vitpcm`: four of them behind the pretrained network).
  Class tokens learn the tags before they learn where to look, so that the seeds of `mctformer` are the maps of its
  patches, under a background of their own; and the affinity of `afa` starts as the likeness of patches, without which
  its masks were at 11.3.
- `reviewkd` has the masks of the plain CAM, and its segmentation here is the teacher's, 46.4, 44.5 and 48.7 on the 80
  pictures with seeds 0, 1 and 2. The smaller student was at 48.6, 44.1 and 46.6 alone and at 49.7, 45.7 and 46.6
  under the teacher: the right direction with two of three, and a teacher that is hardly better than its student says
  little about distillation.
- `clims` listens to a small image-text model trained on the captions of these pictures, and hangs on its seed: maps
  of 39.2, 44.8 and 30.8, masks of 38.3, 51.0 and 24.9 after the CRF, so above the plain CAM with one of three. It was
  not looked into whether that model, the weights of the terms or the 90 steps make the difference. With seed 2 its
  segmentation diverged besides (loss 0.7 at step 10, 7.7 at step 40), which no other curve at hand does.
- `c2am` is no better than the plain CAM where both have a CRF: its cue has been through one, so that a second adds
  nothing, which leaves its gain over the maps themselves (50.2 against 44.5, 44.6 against 43.1 and 49.3 against 43.1
  with seeds 0, 1 and 2). The cue learns in 70 steps and agrees with the masks at 65.4, 60.4 and 64.2; it was not
  looked into why less with the second seed.
- `l2g`'s second network hears of classes from the first alone: from ImageNet it was at 21.9, so both start as the plain
  classifier. It takes much for cows that is none (precision 29 % at a recall of 69) and misses foxes and tractors
  (recall 38 % of both); the CRF and the segmentation network deepen that. Why cows was not looked into.
- `sipe` has maps as good as the plain ones that find less of the objects (recall 59 against 63 %), and each refinement
  makes them more precise and smaller: precision 63, 69 and 76 %, recall 59, 55 and 53 % of the maps, IRN's masks and
  the CRF's. So the CRF, which adds six points to the plain maps, adds none to them. Whether longer training or another
  weight of its background would change that was not tried.
- The data has saliency maps of its own, soft and nearly right, which make the masks of `rca` and `edam` what they
  are, and not their maps. A CRF takes most of it away again: broad maps become so certain in it that they overrule or
  contradict the saliency. So the segmentation learns from the labels without it.
"""
PARTS = {"runs": (PHOTOGRAPHS, PHOTOGRAPHS_REMARKS), "demo": (DEMO, DEMO_REMARKS)}


def main(folders: list[Path]) -> None:
    """Keep the records of the runs in ``folders`` and render all that there are into results.md beside this file."""
    for folder in run_folders(folders):
        keep(folder)
    systems = list(discover())
    lines = [TITLE]
    for part, (introduction, remarks) in PARTS.items():
        runs = {file.stem: json.loads(file.read_text()) for file in sorted((RECORDS / part).glob("*.json"))}
        results = Results(runs, systems)
        pictures = []
        for name, svg in results.plots().items():
            pictures.append(f"images/results_{part}_{name}")
            write_text(HERE / pictures[-1], svg)
        lines += [introduction, *markdown(results, pictures, level=3, remarks=remarks)]
        if part == "runs":
            before, after = FIGURES.split(README.read_text(encoding="utf-8"))
            write_text(README, before + figures(results) + after)
    write_text(HERE / "results.md", "\n".join(lines))


def figures(results: Results) -> str:
    """The table of all systems without those that were not run, which are named below it."""
    (_, _, *titles), rows = results.overview()[0].header, results.overview()[0].rows
    lines = [f"| recipe | {' | '.join(titles)} |", "| --- |" + " --: |" * len(titles)]
    absent = [name for name, found, *_ in rows if found == NOT_RUN]
    lines += [f"| [{name}](recipes/{name}.py) | {' | '.join(row)} |" for name, found, *row in rows if found != NOT_RUN]
    if absent:
        lines += ["", f"Not run on photographs yet: {', '.join(absent)}."]
    return "\n".join([*lines, ""])


def keep(folder: Path) -> None:
    """Write ``data/PART/NAME.json``: the record of a run without places of this machine, and its command."""
    record, config = record_of(folder), read_settings(folder)
    on_demo = str(record["data"]).startswith("demo")
    name = _named(folder.name, record["seed"])
    record["reused"] = record["reused"] and _named(record["reused"], record["seed"])
    place_of_runs = "runs/demo" if on_demo else "runs"
    places = {"until": None} if on_demo else {"until": None, "data": "voc:PATH"}
    for key, place in (("outside", "FOLDER"), ("saliency", None), ("reuse", None), ("share", None)):
        if isinstance(config.get(key), str):
            places[key] = place or f"{place_of_runs}/{_named(Path(config[key]).name, record['seed'])}"
    record["data"] = places.get("data", record["data"])
    record["command"] = repeat_command({**config, **places, "out": f"{place_of_runs}/{name}"})
    text = json.dumps(record, indent=1) + "\n"
    write_text(RECORDS / ("demo" if on_demo else "runs") / f"{name}.json", text)


def _named(name: str, seed: int) -> str:
    """The name of a run with its seed, which a folder need not have in its own."""
    return name if re.search(r"-[a-z]+\d", name) else f"{name}-s{seed}"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
