"""Measure what training on rows on disk takes, write the numbers down, and draw the table of the notebook anew:

    python scripts/measure_rows.py                                  # 10,000, 100,000 and 1,000,000 rows: half an hour
    python scripts/measure_rows.py --rows 1000 4000 --steps 20 --folder numbers --notebook ''

The numbers go into `measured.json` of the folder, with date, processor and versions; the table goes into the notebook.
A process of its own makes the files, and another one for each measurement trains a small denoiser on them."""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import torch
from torch import nn
from fastldm.codes.text2image import TextLatents
from fastldm.core.show import figures_path
from fastldm.core.train import Learner, SampleCB, set_seed
from fastldm.diffusion import Conditioner, Cosine, Denoiser, FirstStage, LabelEmbedder, LatentDataset
from fastldm.diffusion import TextEmbedder, UNet, diffusion_loss
from fastldm.recipes.figures import cached

NOTEBOOK = Path(__file__).parents[1]/'nbs/core/07_rows.ipynb'
KINDS = dict(latents='latents', text='latents and text')

class MadeUp:
    "Pictures of two channels and eight pixels, with labels, names and captions, all different; only sizes matter."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def digest(self): return f'made up {self.n}'
    def __getitems__(self, idxs):
        i = torch.as_tensor(idxs)
        image = torch.sin(i[:,None]*.1+torch.arange(128)).view(-1, 2, 8, 8)
        return dict(image=image, label=i%10, name=[f'{j:07d}.png' for j in idxs],
                    caption=[f'a picture with the number {j} and a {j%7} in it' for j in idxs])

class AsItIs(FirstStage):
    "An autoencoder whose latents are the pictures."
    def __init__(self): super().__init__(2, 2, 1)
    def encode_params(self, x): return x, None

class Words(nn.Module):
    "A text encoder: five vectors of sixteen numbers for each caption."
    def text_features(self, captions):
        numbers = torch.tensor([len(caption)+sum(map(ord, caption)) for caption in captions])
        return torch.sin(numbers[:,None]*.1+torch.arange(80)).view(-1, 5, 16)

def private_memory():
    "MB of memory of this process behind which no file stands."
    with open('/proc/self/smaps_rollup') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('Anonymous:'))/1024

def data_of(kind, n, folder, in_memory=False):
    "The data set, of files that are there or are made now; with `in_memory`, all of it is read."
    data = latents = LatentDataset(MadeUp(n), AsItIs(), folder, 4096, progress=False)
    if kind=='text': data = TextLatents(latents, latents.caption, Words(), folder)
    if not in_memory: return data
    latents.latent = latents.latent.clone()
    latents.fields = {name: values.clone() if torch.is_tensor(values) else list(values)
                      for name,values in latents.fields.items()}
    if kind=='text': data.features, data.row = data.features.clone(), data.row.clone()
    return data

def train(kind, n, folder, steps, in_memory):
    "Train for some steps; what that took."
    torch.set_num_threads(1)
    set_seed(0)
    embedders = dict(label=LabelEmbedder(10, 32))
    if kind=='text': embedders['text'] = TextEmbedder(16, 32, 16)
    model = Denoiser(UNet(2, (16,), 1, d_emb=32, d_context=16), Cosine(), Conditioner(**embedders))
    settings = dict(batch_size=64, warmup=5, progress=False)
    Learner(model, data_of(kind, 1000, folder), diffusion_loss, steps=5, **settings).fit()   # what a first use takes
    start = time.perf_counter()
    data = data_of(kind, n, folder, in_memory)
    data.__getitems__(list(range(0, n, n//64))[:64])
    first_batch = time.perf_counter()-start
    used = []
    watch = SampleCB(steps, lambda learn: used.append(private_memory()))
    start = time.process_time()
    Learner(model, data, diffusion_loss, steps=steps, cbs=[watch], **settings).fit()
    return dict(private_mb=used[-1], first_batch_s=first_batch, steps_per_s=steps/(time.process_time()-start))

def in_a_process(*arguments):
    "What this program prints as its last line, in a process of its own."
    done = subprocess.run([sys.executable, __file__, '--child', json.dumps(arguments)], text=True, check=True,
                          stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])

def measure(rows, steps):
    "All numbers: {kind: {rows: {'in place' or 'in memory': numbers}}}."
    found = {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for n in rows:
            for kind in KINDS:
                in_a_process('make', kind, n, folder)
                found[kind][str(n)] = {where: in_a_process('train', kind, n, folder, steps, where=='in memory')
                                       for where in ('in place','in memory')}
                print(kind, n, found[kind][str(n)], flush=True)
    return found

def child(what, kind, n, folder, *arguments):
    "What one process does: make the files, or train on them."
    if what=='train': return train(kind, n, folder, *arguments)
    data_of(kind, 1000, folder)
    return len(data_of(kind, n, folder))

def table(found):
    "Markdown."
    names = ['data', 'items', 'private memory, MB', 'first batch, s', 'steps a second', 'all in memory: MB',
             'first batch, s']
    lines = [f"| {' | '.join(names)} |", '|---'*len(names)+'|']
    for kind,of_rows in found.items():
        for n,numbers in of_rows.items():
            place, memory = numbers['in place'], numbers['in memory']
            first = KINDS[kind] if n==next(iter(of_rows)) else ''
            lines.append(f"| {first} | {int(n):,} | {place['private_mb']:.0f} | {place['first_batch_s']:.2f} | "
                         f"{place['steps_per_s']:.1f} | {memory['private_mb']:.0f} | {memory['first_batch_s']:.2f} |")
    return '\n'.join(lines)

def measured_on(folder):
    "When and on what the numbers were measured, as a sentence."
    file = Path(folder or figures_path())/'measured.json'
    about = json.loads(file.read_text())['rows on disk']['provenance']
    threads = 'one thread' if about['threads']==1 else f"{about['threads']} threads"
    on = f"{threads} of {about['processor']}, with torch {about['versions']['torch']}"
    return f"Measured on {about['date']}, by {on}."

def redraw(notebook, lines, sentence):
    "Put the table, and the sentence that begins with 'Measured on', in the place of those that are there."
    content = json.loads(notebook.read_text(encoding='utf-8'))
    for cell in content['cells']:
        source = ''.join(cell['source']).split('\n')
        if cell['cell_type']!='markdown' or not any(line.startswith('| data | items |') for line in source): continue
        first = next(i for i,line in enumerate(source) if line.startswith('|'))
        others = [sentence if line.startswith('Measured on ') else line for line in source if not line.startswith('|')]
        cell['source'] = '\n'.join([*others[:first], lines, *others[first:]]).splitlines(keepends=True)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')

def main():
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, nargs='+', default=[10_000, 100_000, 1_000_000], help='sizes of the data')
    parser.add_argument('--steps', type=int, default=600, help='of each training')
    parser.add_argument('--folder', default=None, help='of measured.json (default: that of the figures)')
    parser.add_argument('--notebook', default=str(NOTEBOOK), help="whose table is drawn anew; '': none")
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*json.loads(args.child))))
        return
    def measure_all(): return measure(args.rows, args.steps)
    lines = table(cached('rows on disk', measure_all, args.folder, rows=args.rows, steps=args.steps))
    print(lines)
    if args.notebook: redraw(Path(args.notebook), lines, measured_on(args.folder))

if __name__=='__main__': main()
