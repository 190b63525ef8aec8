"""Train recipes one after another within a budget of minutes, and say how fast and how good they are:

    python scripts/train_all.py fashion flowers --minutes 10 --out runs

A recipe whose share of the time is over keeps a checkpoint; the same command goes on with it, also on another machine,
with a GPU or without. What one recipe leaves of its time goes to those that follow."""
import argparse
import time
from pathlib import Path
import torch
from fastldm.core.models import check_choice, default_device
from fastldm.core.train import Callback, Interrupted
from fastldm.core.watch import DeadlineCB, held_out_loss
from fastldm.recipes import RECIPES, eval_cli
from fastldm.recipes.commands import quick_options
from fastldm.recipes.stages import every_stage
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 5 # steps that are not timed: memory is allocated, and networks are compiled

def clock():
    "Seconds, once all that a GPU was asked for is done."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()

def peak_rate(device, dtype, n=2048):
    "Floating-point operations a second in a product of matrices, the best of five; the first one is for warming up."
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = clock()
        a@a
        seconds.append(clock()-start)
    return 2*n**3/min(seconds[1:])

class SpeedCB(Callback):
    "`rows` has, by stage, the steps a second and the operations of a step, which are three times those of a loss."
    def __init__(self): self.rows = {}

    def before_fit(self, learn):
        self.first = learn.step+WARM_UP
        self.stage = learn.folder.parent.name

    def after_step(self, learn):
        if learn.step==self.first:
            with FlopCounterMode(display=False) as counter: held_out_loss(learn, learn.data, learn.batch_size)
            learn.model.train()
            self.flops = 3*counter.get_total_flops()
            self.start = clock()
        timed = learn.step-self.first
        if timed>0 and (timed%20==0 or learn.step>=learn.steps):
            self.rows[self.stage] = dict(step=learn.step, of=learn.steps, flops=self.flops,
                                         rate=timed/(clock()-self.start))

def train_one(train, minutes, compiled, **options):
    "The trained model, or None where the time was over; and what was measured."
    speed = SpeedCB()
    deadline = DeadlineCB(minutes)
    with every_stage(deadline, speed, compile=compiled):
        try: return train(**options), speed.rows
        except Interrupted:
            if not deadline.is_over: raise                          # Ctrl-C
            return None, speed.rows

def report(name, model, rows, peak):
    "A line for each stage that was trained now."
    for stage,row in rows.items():
        share = row['rate']*row['flops']/peak
        print(f"{name}, {stage}: step {row['step']:,} of {row['of']:,}, {row['rate']:.2f} steps/s, {share:.0%} of peak")
    if model is None: print(f'{name}: its time is over; the same command goes on')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipes', nargs='+', help='recipes by name, in this order')
    parser.add_argument('--minutes', type=float, default=60, help='for all of them together')
    parser.add_argument('--out', type=Path, default=Path('runs'), help='where the folders of the models go')
    parser.add_argument('--precision', help='bf16, fp16 or none (default: bf16 on a GPU)')
    parser.add_argument('--compile', action='store_true', help='compile the networks')
    parser.add_argument('--n', type=int, default=1000, help='pictures to score a finished model by; 0: no score')
    parser.add_argument('--quick', action='store_true', help='a trial: 20 steps for each stage')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    try:
        for name in options.recipes: check_choice(name, RECIPES, 'recipe')
    except ValueError as error: parser.error(str(error))
    device = default_device()
    precision = options.precision or ('bf16' if device.type=='cuda' else None)
    if precision=='none': precision = None
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision, torch.float32)
    peak = peak_rate(device, dtype)
    print(f'{device}, {dtype}: {peak/1e12:.3g} TFLOP/s in a product of matrices')
    end = time.monotonic()+60*options.minutes
    for i,name in enumerate(options.recipes):
        minutes = (end-time.monotonic())/60/(len(options.recipes)-i)
        if minutes<=0: break
        train = RECIPES[name]
        lengths = quick_options(train) if options.quick else {}
        model, rows = train_one(train, minutes, options.compile, folder=options.out/name, precision=precision,
                                seed=options.seed, **lengths)
        report(name, model, rows, peak)
        if hasattr(model, 'evaluate_command') and options.n: eval_cli(str(options.out/name), n=options.n)

if __name__=='__main__': main()
