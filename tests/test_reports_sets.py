"""Sets that outgrow one machine: parts by the names of files, damaged tar files, interrupted streams and drawings, what
shards cannot hold, and how often shards are read."""
import bz2, gzip, io, json, lzma, os, signal, subprocess, sys, tarfile, warnings
from itertools import islice
import pytest, torch
from PIL import Image
from fastldm.core import Batches
from fastldm.data import (Balanced, Digits, Part, Pictures, Shards, get_dataset, open_shards, part_in_name,
                          write_shards, write_stream)
from fastldm.recipes import captioned_set, draw_shards

def greys(first, n, **options):
    "Pictures of one grey each."
    image = torch.arange(first, first+n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return Pictures(image, **options)

def greys_in(ds): return ds.pixels(range(len(ds)))[:,0,0,0].tolist()

def part(folder, split, test=0.): return greys_in(open_shards(folder, split, size=8, channels=1, test=test))

def one_tar(file, first, n=2):
    "A tar file of its own name, without an index."
    written, = write_shards(greys(first, n), file.parent/'writing', per_shard=n, shuffle=False)
    return written.rename(file)


# ---- parts by the names of files

@pytest.mark.parametrize('name,expected', [
    ('train-00000-of-00004.parquet','train'), ('imagenet-val-000000.tar','val'), ('Birds_TEST_3.tar','test'),
    ('birds.dev.parquet','val'), ('eval2017.tar','test'), ('trainset-1.tar','train'), ('trainval.parquet','train'),
    ('testdata.tar','test'), ('training-photos.tar','train'), ('testimonials.tar',None), ('contest-3.tar',None),
    ('restrain.tar',None), ('valley-of-devotion.tar',None), ('000000.tar',None), ('prüftest.tar',None)])
def test_the_part_in_a_name(name, expected): assert part_in_name(name)==expected

@pytest.mark.parametrize('held_out', ['test','val','validation'])
def test_shards_that_are_named_after_their_part(tmp_path, held_out):
    "The shards for testing were trained on."
    one_tar(tmp_path/f'birds-{held_out}-000000.tar', 90)
    for i in range(3): one_tar(tmp_path/f'birds-train-{i:06d}.tar', 2*i)
    assert part(tmp_path, 'train')==[*range(6)]
    assert part(tmp_path, 'test')==[90,91]
    with pytest.raises(ValueError, match=f'has the shards for testing .birds-{held_out}-000000.tar'):
        part(tmp_path, 'train', test=.25)
    if held_out!='test':
        one_tar(tmp_path/'birds-test-000000.tar', 95)
        assert part(tmp_path, 'test')==[95,96]

def test_shards_whose_names_contain_longer_words(tmp_path):
    "They are all for training, and may be divided."
    names = ['contest.tar','portraits.tar','testimonials.tar','training-photos.tar']
    for i,name in enumerate(names): one_tar(tmp_path/name, 2*i)
    assert part(tmp_path, 'train')==[*range(8)]
    assert (part(tmp_path, 'train', test=.25), part(tmp_path, 'test', test=.25))==([*range(6)], [6,7])
    with pytest.raises(FileNotFoundError, match="part 'test'"): part(tmp_path, 'test')

def test_a_shard_for_testing_beside_one_that_does_not_say(tmp_path):
    one_tar(tmp_path/'test-0.tar', 0)
    with pytest.warns(UserWarning, match='by their names .* taken for training'): assert part(tmp_path, 'train')==[0,1]
    one_tar(tmp_path/'more.tar', 2)
    for split in ('train','test'):
        with pytest.raises(ValueError, match='test-0.tar is for testing by its name, and that of more.tar'):
            part(tmp_path, split)

def test_folders_of_shards_count_before_names(tmp_path):
    for i,folder in enumerate(('train','test')):
        (tmp_path/folder).mkdir()
        one_tar(tmp_path/folder/'test-0.tar', 2*i)
    assert (part(tmp_path, 'train'), part(tmp_path, 'test'))==([0,1], [2,3])

def a_table(numbers, **columns):
    "A table of grey pictures."
    datasets = pytest.importorskip('datasets')
    features = dict(image=datasets.Image()) | {name: datasets.Value('string') for name in columns}
    pictures = [Image.new('L', (8,8), i) for i in numbers]
    return datasets.Dataset.from_dict(dict(image=pictures, **columns), features=datasets.Features(features))

def table_part(folder, split): return greys_in(get_dataset(folder, split=split, size=8, channels=1))

@pytest.mark.parametrize('names,train,test', [
    (('digits-train-00000-of-00001','digits-test-00000-of-00001'), [0,1], [2,3]),
    (('train-0','validation-0'), [0,1], [2,3]),
    (('birds_train','birds_valid','birds_eval'), [0,1], [4,5]),
    (('trainset','testset'), [0,1], [2,3]),
    (('training-a','testing-a'), [0,1], [2,3]),
    (('train/0','test/train-of-birds'), [0,1], [2,3]),
    (('contest','valley'), [0,1,2,3], None)])
def test_tables_that_are_named_after_their_part(tmp_path, names, train, test):
    "A word anywhere in the name counts; one that is only contained in a longer word does not."
    for i,name in enumerate(names):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        a_table([2*i,2*i+1]).to_parquet(tmp_path/f'{name}.parquet')
    assert table_part(tmp_path, 'train')==train
    if test: assert table_part(tmp_path, 'test')==test
    else:
        with pytest.raises(FileNotFoundError, match="of the part 'test'"): table_part(tmp_path, 'test')

def test_a_table_that_is_left_out(tmp_path):
    "Its name does not say what it is for, and that of another does."
    a_table([0,1]).to_parquet(tmp_path/'testimonials.parquet')
    a_table([2,3]).to_parquet(tmp_path/'birds-train.parquet')
    with pytest.warns(UserWarning, match='testimonials.parquet is left out .1 in all.'):
        assert table_part(tmp_path, 'train')==[2,3]

def test_captions_of_a_named_part(tmp_path):
    "A tenth was held out of both, and the captions for testing were trained on."
    a_table([0,1], caption=['a','b']).to_parquet(tmp_path/'birds-train.parquet')
    a_table([2], caption=['c']).to_parquet(tmp_path/'birds-test.parquet')
    assert [captioned_set(tmp_path, split=split, size=8).caption for split in ('train','test')]==[['a','b'],['c']]


# ---- damaged tar files

@pytest.fixture
def whole(tmp_path):
    "A shard of twenty pictures without an index, and its members."
    file = one_tar(tmp_path/'a.tar', 0, 20)
    with tarfile.open(file) as tar: members = tar.getmembers()
    return file,members

def shard(file): return Shards(file, size=8, channels=1)

def flipped(raw, place):
    "The bytes with one wrong bit."
    raw = bytearray(raw)
    raw[place] ^= 1
    return raw

@pytest.mark.parametrize('damage', ['bit','last bit','cut in a file','cut in a header','cut in the filling',
                                    'hole','joined'])
def test_a_tar_file_with_damage_behind_its_first_header(whole, damage):
    "It was read up to the damage without a word."
    file,members = whole
    raw = file.read_bytes()
    fifth,last = members[5],members[-1]
    hole = raw[:fifth.offset]+bytes(1024)+raw[fifth.offset+1024:]
    damaged = {'bit':flipped(raw, fifth.offset), 'last bit':flipped(raw, last.offset+100),
               'cut in a file':raw[:fifth.offset_data+20], 'cut in a header':raw[:fifth.offset+200],
               'cut in the filling':raw[:fifth.offset_data+fifth.size+1], 'hole':hole, 'joined':raw+raw}
    file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match='a.tar is damaged .*: fetch or write it again'): shard(file)

def test_a_tar_file_without_its_end_mark(whole):
    "Some writers leave it out: all is read, and a warning says what else it may mean. One block of the two is enough."
    file,members = whole
    raw = file.read_bytes()
    end = max(m.offset_data+(m.size+511)//512*512 for m in members)
    assert not raw[end:].strip(b'\0') and len(raw)-end>=1024
    file.write_bytes(raw[:end])
    with pytest.warns(UserWarning, match='a.tar ends without the blocks of zeros'):
        assert greys_in(shard(file))==[*range(20)]
    for n_zeros in (512, 1024, 10_240):
        file.write_bytes(raw[:end]+bytes(n_zeros))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert greys_in(shard(file))==[*range(20)]

@pytest.mark.parametrize('packer', [gzip,bz2,lzma])
def test_a_packed_tar_file_with_damage(whole, packer):
    "As a plain one; the whole one is read without a warning."
    file,members = whole
    raw = file.read_bytes()
    packed = file.with_name('b.tar')
    def pack(content): packed.write_bytes(packer.compress(bytes(content)))
    pack(raw)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert greys_in(shard(packed))==[*range(20)]
    pack(flipped(raw, members[5].offset))
    with pytest.raises(ValueError, match='b.tar is damaged'): shard(packed)

@pytest.mark.parametrize('format', [tarfile.PAX_FORMAT,tarfile.GNU_FORMAT])
def test_long_names_in_a_tar_file(whole, format):
    "They take several headers, each of which is checked."
    file,members = whole
    with tarfile.open(file) as tar: raw = tar.extractfile(members[0]).read()
    with tarfile.open(file, 'w', format=format) as tar:
        for i in range(3):
            info = tarfile.TarInfo('é'*150+f'/{i}.png')
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert greys_in(shard(file))==[0,0,0]
    with tarfile.open(file) as tar: second = tar.getmembers()[1]
    content = file.read_bytes()
    for place in range(second.offset, second.offset_data, 512):
        if not content[place:place+512].strip(b'\0'): continue
        file.write_bytes(flipped(content, place+148))                # in the checksum of a header, or in a name
        try: found = len(shard(file))
        except ValueError as error: assert 'damaged' in str(error)
        else: assert found==3

def test_shards_at_an_address(whole):
    "They are checked while they arrive."
    memory = pytest.importorskip('fsspec').filesystem('memory')
    file,members = whole
    raw = file.read_bytes()
    memory.pipe('/whole.tar', raw)
    memory.pipe('/damaged.tar', bytes(flipped(raw, members[5].offset)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert greys_in(shard('memory://whole.tar'))==[*range(20)]
    with pytest.raises(ValueError, match='damaged.tar is damaged'): shard('memory://damaged.tar')


# ---- streams and drawings that were interrupted

class BreaksOff:
    "A stream that breaks off after `n` rows."
    def __init__(self, stream, n):
        self.stream,self.n = stream,n
        self.features = stream.features
    def cast_column(self, *args): return BreaksOff(self.stream.cast_column(*args), self.n)
    def skip(self, n): return BreaksOff(self.stream.skip(n), self.n-n)
    def __iter__(self):
        yield from islice(self.stream, self.n)
        raise KeyboardInterrupt

def streamed(stream, folder, n=None): return write_stream(stream, folder, n=n, per_shard=10, progress=False)

def test_an_interrupted_stream_is_not_the_whole(tmp_path):
    table = a_table(range(40))
    with pytest.raises(KeyboardInterrupt): streamed(BreaksOff(table, 25), tmp_path)
    assert len([*tmp_path.glob('[!.]*.tar')])==2
    with pytest.raises(ValueError, match='not written to its end by `write_stream`'): part(tmp_path, 'train')
    streamed(table, tmp_path)
    assert part(tmp_path, 'train')==[*range(40)]

def test_what_is_there_of_a_stream_can_be_taken(tmp_path):
    with pytest.raises(KeyboardInterrupt): streamed(BreaksOff(a_table(range(40)), 25), tmp_path)
    (tmp_path/'stream.json').unlink()
    assert part(tmp_path, 'train')==[*range(20)]

def test_an_interrupted_extension_of_a_stream(tmp_path):
    "The index counted the shard that was filled up as it had been; the first call took it for its own."
    table = a_table(range(40))
    streamed(table, tmp_path, 15)
    assert part(tmp_path, 'train')==[*range(15)]
    with pytest.raises(KeyboardInterrupt): streamed(BreaksOff(table, 25), tmp_path, 40)
    with pytest.raises(ValueError, match='not written to its end'): part(tmp_path, 'train')
    with pytest.raises(ValueError, match='has 20 rows of the stream already, and n=15'): streamed(table, tmp_path, 15)
    assert len(streamed(table, tmp_path, 40))==4
    assert part(tmp_path, 'train')==[*range(40)]
    assert json.loads((tmp_path/'index.json').read_text())=={f'{i:06d}.tar':10 for i in range(4)}

def test_an_extension_that_is_killed_before_its_first_shard(tmp_path):
    "The shards are still those of the first call, which may be repeated."
    table = a_table(range(40))
    streamed(table, tmp_path, 15)
    with pytest.raises(KeyboardInterrupt): streamed(BreaksOff(table, 18), tmp_path, 40)
    streamed(table, tmp_path, 15)
    assert part(tmp_path, 'train')==[*range(15)]

def test_a_stream_of_an_earlier_version(tmp_path):
    "Its stream.json does not say whether it is whole, and it was written at the end."
    table = a_table(range(25))
    files = streamed(table, tmp_path)
    (tmp_path/'stream.json').write_text('{"has_ended": true}')
    assert part(tmp_path, 'train')==[*range(25)]
    assert streamed(table, tmp_path)==files

def test_shards_in_the_place_of_an_interrupted_stream(tmp_path):
    "`write_shards` writes over them, and nothing is left of the stream."
    with pytest.raises(KeyboardInterrupt): streamed(BreaksOff(a_table(range(40)), 15), tmp_path)
    write_shards(greys(100, 20), tmp_path, per_shard=10, shuffle=False)
    assert part(tmp_path, 'train')==[*range(100, 120)]

def test_a_damaged_shard_of_a_stream_is_not_counted(tmp_path):
    table = a_table(range(40))
    files = streamed(table, tmp_path, 20)
    (tmp_path/'index.json').unlink()
    with tarfile.open(files[0]) as tar: third = tar.getmembers()[2]
    files[0].write_bytes(flipped(files[0].read_bytes(), third.offset))
    with pytest.raises(ValueError, match='000000.tar is damaged'): streamed(table, tmp_path)

def test_a_drawing_that_is_not_finished(tmp_path):
    "Half of it is not taken for all of it; finished, it is a set."
    folder = tmp_path/'drawn'
    def draw(n, first):
        if first==8 and is_stopped: raise KeyboardInterrupt
        return (torch.arange(first, first+n)/255)[:,None,None,None].expand(n, 1, 8, 8)
    is_stopped = True
    options = dict(n=20, folder=folder, settings=dict(seed=0), per_shard=4, part=4, progress=False)
    with pytest.raises(KeyboardInterrupt): draw_shards(draw, **options)
    with pytest.raises(ValueError, match='has a drawing that is not finished'): part(folder, 'train')
    is_stopped = False
    draw_shards(draw, **options)
    assert part(folder, 'train')==[*range(20)]


# ---- what a killed process leaves

KILLED = '''
import os, signal, sys, torch
from fastldm.data import Pictures, write_shards
class Kills(Pictures):
    def __getitem__(self, i):
        if i==15: os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)
write_shards(Kills(torch.zeros(40,1,8,8).byte()), sys.argv[1], per_shard=10, shuffle=False)
'''

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='Windows cannot kill in this way')
def test_shards_after_a_kill(tmp_path):
    "The hidden file of the killed process is no shard of another set; when it is an hour old it is deleted."
    assert subprocess.run([sys.executable,'-c',KILLED,str(tmp_path)]).returncode==-signal.SIGKILL
    left, = tmp_path.glob('.*.tar')
    with pytest.raises(ValueError, match='has 1 of 4 shards'): part(tmp_path, 'train')
    write_shards(greys(0, 40), tmp_path, per_shard=10, shuffle=False)
    assert part(tmp_path, 'train')==[*range(40)]
    long_ago = left.stat().st_mtime-2*3600
    os.utime(left, (long_ago,long_ago))
    write_shards(greys(0, 40), tmp_path, per_shard=10, shuffle=False)
    assert not [*tmp_path.glob('.*')]


# ---- what shards do not hold

class Known(Pictures):
    "Pictures of which more is known than shards hold."
    def __getitems__(self, idxs):
        return dict(super().__getitems__(idxs), mask=torch.zeros(len(idxs), 8, 8), name=[str(i) for i in idxs])

def test_what_is_lost_in_shards(tmp_path):
    "A field and a mask are named; a set with labels only says nothing."
    ds = Known(greys(0, 4).image, label=[0,1,0,1])
    ds.fields = dict(width=torch.arange(4.))
    with pytest.warns(UserWarning, match='the shards are without mask, width of Known') as said:
        files = write_shards(ds, tmp_path/'a', shuffle=False)
    assert len(said)==1 and shard(files)[:].keys()=={'image','label'}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        write_shards(greys(0, 4, label=[0,1,0,1]), tmp_path/'b')


# ---- how often shards are read

@pytest.fixture
def shards(tmp_path):
    "Two hundred pictures in ten shards, of which four fit into memory."
    return Shards(write_shards(greys(0, 200), tmp_path/'shards', per_shard=20, shuffle=False), size=8, channels=1)

def epoch(ds, batch_size=10, seed=0):
    "The greys of an epoch, in its order."
    batches = Batches(ds, batch_size, seed=seed)
    seen = torch.cat([batches[m]['image'][:,0,0,0] for m in range(batches.batches_per_epoch)])
    return seen.add(1).mul(127.5).round().int().tolist()

def test_a_part_of_shards_reads_each_of_them_once(shards, reads):
    half = Part(shards, range(0, 200, 2))
    shards.loaded.clear()
    reads.clear()
    seen = epoch(half)
    assert sorted(seen)==[*range(0, 200, 2)] and seen!=sorted(seen)
    assert sorted(reads)==[*range(10)]
    assert epoch(half, seed=1)!=seen
    shards.loaded.clear()
    reads.clear()
    assert sorted(epoch(Part(half, range(50, 0, -1))))==[*range(2, 102, 2)]       # of a part of a part
    assert sorted(reads)==[*range(6)]

def test_a_part_of_few_shards_is_mixed(shards):
    "Shards without a row of the part do not take the place of those that have some."
    seen = epoch(Part(shards, range(80)), batch_size=80)
    assert sorted(seen)==[*range(80)]
    assert len({grey//20 for grey in seen[:40]})==4

def test_balanced_shards_are_read_once_in_each_pass(shards, reads):
    "Rare things come up more often, and no row is all of a batch."
    things = ['apple' if i%50==0 else 'cook' for i in range(200)]
    balanced = Balanced(shards, things, power=.5, times=3)
    shards.loaded.clear()
    reads.clear()
    seen = epoch(balanced, batch_size=1)
    assert len(reads)<=3*10
    assert sorted(seen)==balanced.row.tolist()
    for begin in (0,200,400):
        apples = [grey for grey in seen[begin:begin+200] if grey%50==0]
        assert {0,50,100,150}=={*apples} and 24<=len(apples)<=28           # 4·√49 to 196·1, as in the whole
    neighbours = sum(a==b for a,b in zip(seen, seen[1:]))
    assert neighbours<12

def test_a_part_of_shards_is_written_by_reading_each_once(shards, tmp_path, reads):
    ds = Part(shards, range(1, 200, 2))
    shards.loaded.clear()
    reads.clear()
    files = write_shards(ds, tmp_path/'again', per_shard=30)
    assert len(reads)<=11                                            # one more to see what is lost
    assert sorted(greys_in(shard(files)))==[*range(1, 200, 2)]

def test_the_order_of_shards_is_what_it_was(shards):
    "The orders of runs that began before parts had one."
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randperm(10, generator=generator).tolist()
    expected = []
    for i in range(0, 10, 4):
        together = torch.cat([torch.arange(20*s, 20*s+20) for s in numbers[i:i+4]])
        expected += together[torch.randperm(len(together), generator=generator)].tolist()
    assert shards.order(torch.Generator().manual_seed(3)).tolist()==expected

def test_plain_sets_are_shuffled_as_before():
    digits = Digits(split='test')
    part_of_digits = Part(digits, range(0, 297, 3))
    for ds in (digits, part_of_digits, Part(part_of_digits, range(50)), Balanced(digits, digits.label.tolist()),
               Balanced(part_of_digits, part_of_digits.label.tolist())):
        order = Batches(ds, 16, seed=5)
        plain = Batches([*range(len(ds))], 16, seed=5)
        assert [order.indices(m) for m in range(20)]==[plain.indices(m) for m in range(20)]
