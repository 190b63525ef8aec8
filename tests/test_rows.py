"Files of rows: what was written is read, batches that do not fit and files that are damaged are refused."
import json, struct
import pytest, torch
import safetensors.torch
from fastcore.test import test_eq as eq
from fastldm.core.rows import Texts, digest_of_list, read_rows, write_rows

def batch(**changed):
    "Two rows of four fields, some of them others."
    fields = dict(latent=torch.ones(2, 3, 4), label=torch.tensor([1,2]), half=torch.ones(2, 2).bfloat16(),
                  caption=['one','two'])
    return {name: values for name,values in dict(fields, **changed).items() if values is not None}

WRONG = {                                                 # what differs from the first batch: (field, message)
    'type': (dict(latent=torch.ones(2, 3, 4).double()), 'expected the same'),
    'whole': (dict(label=torch.tensor([1.,2.])), 'expected the same'),
    'smaller': (dict(latent=torch.ones(2, 3, 2)), 'expected the same'),
    'larger': (dict(latent=torch.ones(2, 3, 8)), 'expected the same'),
    'dimension': (dict(latent=torch.ones(2, 12)), 'expected the same'),
    'missing': (dict(label=None), 'expected the same'),
    'missing list': (dict(caption=None), 'expected the same'),
    'more': (dict(other=torch.ones(2)), 'expected the same'),
    'another list': (dict(other=['a','b']), 'expected the same'),
    'list': (dict(label=[1,2]), 'expected the same'),
    'tensor': (dict(caption=torch.ones(2)), 'expected the same'),
    'fewer rows': (dict(label=torch.tensor([1])), 'as many of each'),
    'more texts': (dict(caption=['a','b','c']), 'as many of each'),
    'a number': (dict(label=torch.tensor(1)), 'label is a single number'),
    'complex': (dict(label=torch.ones(2, dtype=torch.complex64)), 'label is torch.complex64'),
}

@pytest.mark.parametrize('wrong', WRONG)
def test_a_batch_that_does_not_fit_is_refused(tmp_path, wrong):
    "Its bytes would be written over other fields, and the digest would be right. No file is left."
    changed, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message): write_rows(tmp_path/'rows', 4, [batch(), batch(**changed)])
    eq([*tmp_path.iterdir()], [])

@pytest.mark.parametrize('wrong', ['fewer rows','more texts','a number','complex'])
def test_a_first_batch_that_is_no_batch(tmp_path, wrong):
    changed, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message): write_rows(tmp_path/'rows', 4, [batch(**changed)])
    eq([*tmp_path.iterdir()], [])

@pytest.mark.parametrize('n,message', [(3,'given 4 rows for a file of 3'), (5,'4 of 5 rows'), (0,'n=0'), (2.5,'n=2.5')])
def test_another_number_of_rows(tmp_path, n, message):
    with pytest.raises(ValueError, match=message): write_rows(tmp_path/'rows', n, [batch(), batch()])
    eq([*tmp_path.iterdir()], [])

def test_batches_of_different_length_are_fine(tmp_path):
    "Also one without rows."
    first = batch()
    one = {name: values[:1] for name,values in first.items()}
    none = {name: values[:0] for name,values in first.items()}
    for batches in ([none, first, one, none, first], [one, first, first]):
        write_rows(tmp_path/'rows', 5, batches)
        rows = read_rows(tmp_path/'rows')
        eq(len(rows['caption']), 5)
        assert torch.equal(rows['label'], torch.cat([part['label'] for part in batches]))
        assert torch.equal(rows['half'], torch.ones(5, 2).bfloat16())

@pytest.mark.parametrize('length', [0,7,8,100,5000])
def test_a_file_that_is_cut_off(tmp_path, length):
    "The message names the file and a remedy."
    write_rows(tmp_path/'rows', 2, [batch()])
    whole = (tmp_path/'rows').read_bytes()
    assert length<len(whole)-1
    for n_bytes in (length, len(whole)-1):
        (tmp_path/'rows').write_bytes(whole[:n_bytes])
        with pytest.raises(ValueError, match='delete it, and it is made again: .*rows'): read_rows(tmp_path/'rows')

def of_another(path): safetensors.torch.save_file(dict(a=torch.ones(2)), path)
def of_another_with_metadata(path): safetensors.torch.save_file(dict(a=torch.ones(2)), path, dict(by='me'))
def a_text(path): path.write_text('a text that is no safetensors file')
def a_list(path): path.write_bytes(struct.pack('<Q', 6)+b'[1, 2]')
def a_dict_of_numbers(path):
    header = json.dumps(dict(__metadata__=dict(digest='0'), a=1)).encode()
    path.write_bytes(struct.pack('<Q', len(header))+header)

@pytest.mark.parametrize('make', [of_another, of_another_with_metadata, a_text, a_list, a_dict_of_numbers])
def test_a_file_of_something_else(tmp_path, make):
    make(tmp_path/'rows')
    with pytest.raises(ValueError, match='no file of rows .*delete it'): read_rows(tmp_path/'rows')

def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError): read_rows(tmp_path/'rows')

def test_files_whose_digest_has_its_earlier_name(tmp_path):
    "These are in the caches of earlier versions."
    write_rows(tmp_path/'rows', 2, [batch()])
    whole = (tmp_path/'rows').read_bytes()
    (tmp_path/'rows').write_bytes(whole.replace(b'"digest"', b'"spread"'))
    eq(list(read_rows(tmp_path/'rows')['caption']), ['one','two'])

def texts(tmp_path, items):
    write_rows(tmp_path/'rows', len(items), [dict(items=items)])
    return read_rows(tmp_path/'rows')['items']

@pytest.mark.parametrize('items', [['a','b\n','"'], [1,23], [['a'],['b','c']], ['']])
def test_texts_equal_lists(tmp_path, items):
    found = texts(tmp_path, items)
    assert isinstance(found, Texts) and found==items and items==list(found) and found==texts(tmp_path, items)
    for other in (None, 7, {1,2}, [*items,'more'], [None]*len(items)): assert found!=other and not found==other

@pytest.mark.parametrize('one,other', [
    ([1,23],[12,3]), ([1,2,3],[123]), (['a','b'],['ab']), ([[1],[2]],[[1,2]]), (['1'],[1]), ([],['']),
    (['a','b'],['b','a']),
])
def test_different_lists_have_different_digests(tmp_path, one, other):
    assert digest_of_list(one)!=digest_of_list(other)
    for items in (one, other):
        if items: eq(digest_of_list(texts(tmp_path, items)), digest_of_list(items))
