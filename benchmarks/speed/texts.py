"""What the page says between its tables."""

INTRO = """# Speed and memory

A transformer of a DiT's shape with random weights (joint attention, separate q, k, v, proj, MLP of 4 d) and LoRAs with
random factors on every linear layer, through the engine's own calibrate and merge. All ratios are taken within
one repetition, with the runs by turns (those of overheads over a median); tables give the median and, in brackets, the
least and the greatest. d is the width, N the tokens (an eighth of them text), K the number of LoRAs, r their rank,
R = K r."""

ONE_THREAD = """Times are the processor time of one thread, those of files are the clock's: on two cores that others
share, two threads wait for each other, and ratios jump by a tenth. `ARGS="--threads 0"` takes all cores and the
clock."""

CALIBRATION = """## Calibration against bare forward passes

K calibration passes over K passes of the model alone. *Predicted* is what the added operations would cost if each
took as long as one of the forward pass: for a layer of i inputs and o outputs, 2 N i R to project, 2 N R^2 for the
Gram (above 256 rows less: what lies below its panels is mirrored) and an eighth of that for the tokens that are held
out, 2 N r o for the active LoRA, and 4 i r^2 + 2 o r^2 for its coordinates, over 2 N i o and attention's 4 N^2 d.
*Factor* is measured over predicted overhead. *Plain LoRA* is the same K passes with each LoRA in a hook and nothing
recorded, over the bare passes."""

PUBLISHED = """## Against the published algorithm

Followed literally from its description: a clone of all weights copied back for each LoRA (once a task; the authors'
code does it twice), dense deltas added, Grams copied to the host in every hook call and summed there in float64, a
general solver layer by layer. *Overhead* is the whole merge less K bare passes, over the median of the published
one's. Ours has a report in it, and solves every layer a second time to judge it by tokens that were held out, which
the published one does not do; *not judged* leaves that second solve out (`merge(judge=False)`). Neither keeps whole
inputs here, as the published one does not. ***Refined*** is what the nodes do unless told otherwise: sampled inputs
and the correction that is solved from them (from the medians of the next table); it buys quality that the published
one does not have. *Arithmetic alone* is the predicted overhead of calibration (its products at the forward pass's
speed, and nothing else) over the published one's whole overhead. *Routers* is the largest relative difference between
the published routers and those of the engine's mode `paper` and calibration: both do the same."""

SAMPLING = """## Sampled inputs and refinement

The same calibration with up to 256 whole inputs of each layer and LoRA kept (the nodes' default), over bare passes
and over the calibration above; and the merge that is refined by them, over the merge above. Refinement solves in the
space of the sampled tokens, of which a layer keeps at most 1280, or in that of its inputs, if these are fewer; its
cost falls on the solve, not on the passes. One step a LoRA: the text streams here have fewer than 256 tokens in it
and keep these; with four steps, the nodes' default, their layers cost as much as those of the image."""

MEMORY = """## Memory

Peak of everything that PyTorch allocates, above the peak of a bare pass, in MiB. *R^2 terms* are the Grams;
*predicted* adds the coordinates, the active ups and z of the layer with the most tokens. *With samples* keeps up to
256 whole inputs of each layer and LoRA besides. *Solve alone* is counted from what stands before it: the activations
of a bare pass are gone by then and not taken off."""

SOLVE = """## Solve and absorb

Square layers, statistics of 4 R random tokens a LoRA. *Engine* prepares the canonical problem, solves by Cholesky in
batches, absorbs the router and estimates the condition; *sequential* is the published ridge, solved by
`torch.linalg.solve` one layer at a time, and absorbed. *Solver alone* compares the two solvers on the same matrices."""

STORAGE = """## Files

The engine's saving and loading over a plain write and read of as many bytes, without fsync, from the page cache.
Saving copies triangles of Grams or merges' tensors, loading checks every value."""
