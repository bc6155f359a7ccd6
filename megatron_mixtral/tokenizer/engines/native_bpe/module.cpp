// The Python module `_native_bpe`: one class, `Encoder`. Limited API, so that one build serves Python 3.12 and later.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "encoder.h"

namespace {

constexpr Py_ssize_t kLongestText = 0x7FFFFFFF;  // positions in a word are 32-bit numbers

struct EncoderObject {
    PyObject_HEAD
    bpe::Encoder* encoder;
    std::mutex* mutex;  // the encoder's cache and buffers serve one thread at a time
};

// The tables arrive as contiguous buffers of uint32, rows of `Row`. Throws std::invalid_argument or PythonError.
struct PythonError {};

template <class Row>
std::vector<Row> read_table(PyObject* object) {
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_CONTIG_RO | PyBUF_FORMAT) < 0) throw PythonError{};
    const bool right = view.itemsize == 4 && view.len % sizeof(Row) == 0;
    std::vector<Row> rows(right ? view.len / sizeof(Row) : 0);
    if (!rows.empty()) std::memcpy(rows.data(), view.buf, view.len);
    PyBuffer_Release(&view);
    if (!right) throw std::invalid_argument("a table must be a contiguous array of uint32 with whole rows");
    return rows;
}

// Runs `body`, which returns an object or throws; C++ exceptions become Python ones.
template <class Body>
PyObject* guarded(Body body) {
    try {
        return body();
    } catch (const PythonError&) {  // already set
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::length_error&) {
        PyErr_NoMemory();
    } catch (const std::overflow_error& error) {
        PyErr_SetString(PyExc_OverflowError, error.what());
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// A reference that is given up at the end of its scope.
struct Decref {
    void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Decref>;

PyObject* encoder_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    static const char* names[] = {"vocab_size", "characters", "merges", "joins", "byte_ids", "prefix", nullptr};
    unsigned int vocab_size;
    int prefix;
    PyObject *characters, *merges, *joins, *byte_ids;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IOOOOi", const_cast<char**>(names), &vocab_size, &characters,
                                     &merges, &joins, &byte_ids, &prefix)) {
        return nullptr;
    }
    return guarded([&] {
        if (prefix < 0 || prefix > 2) throw std::invalid_argument("prefix must be 0, 1 or 2");
        bpe::Vocabulary vocabulary(vocab_size, read_table<bpe::CharacterEntry>(characters),
                                   read_table<bpe::MergeEntry>(merges), read_table<bpe::JoinEntry>(joins),
                                   read_table<uint32_t>(byte_ids));
        auto mutex = std::make_unique<std::mutex>();
        auto encoder = std::make_unique<bpe::Encoder>(std::move(vocabulary), static_cast<bpe::Prefix>(prefix));
        const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
        PyObject* const self = allocate(type, 0);
        if (!self) throw PythonError{};
        reinterpret_cast<EncoderObject*>(self)->encoder = encoder.release();
        reinterpret_cast<EncoderObject*>(self)->mutex = mutex.release();
        return self;
    });
}

void encoder_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    delete reinterpret_cast<EncoderObject*>(self)->encoder;
    delete reinterpret_cast<EncoderObject*>(self)->mutex;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

struct Text {
    const char* bytes;
    size_t length;
};

// The UTF-8 form of every string of a tuple. Python keeps it with the string, which the tuple keeps alive.
std::vector<Text> utf8_of(PyObject* tuple) {
    std::vector<Text> texts;
    const Py_ssize_t count = PyTuple_Size(tuple);
    texts.reserve(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
        Py_ssize_t length;
        const char* const bytes = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(tuple, i), &length);
        if (!bytes) throw PythonError{};
        if (length > kLongestText) throw std::overflow_error("a text has 2^31 bytes or more");
        texts.push_back(Text{bytes, static_cast<size_t>(length)});
    }
    return texts;
}

// Writes the ids of all texts, each framed by BOS and EOS where these are not negative; returns how many there are.
// A text without any id has length 0 and no frame.
template <class Id>
size_t encode_all(bpe::Encoder& encoder, const std::vector<Text>& texts, int bos, int eos, Id* out, int64_t* lengths) {
    Id* const first = out;
    for (const Text& text : texts) {
        Id* const start = out;
        if (bos >= 0) *out++ = static_cast<Id>(bos);
        const size_t count = encoder.encode(text.bytes, text.length, out);
        out = count > 0 ? out + count : start;
        if (count > 0 && eos >= 0) *out++ = static_cast<Id>(eos);
        *lengths++ = out - start;
    }
    return static_cast<size_t>(out - first);
}

PyObject* encode_texts(EncoderObject* self, PyObject* sequence, int bos, int eos, int itemsize) {
    const Owned tuple(PySequence_Tuple(sequence));
    if (!tuple) throw PythonError{};
    const std::vector<Text> texts = utf8_of(tuple.get());
    size_t capacity = 0;
    for (const Text& text : texts) capacity += bpe::Encoder::capacity(text.length) + 2;
    const Owned ids(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(capacity * itemsize)));
    const Owned lengths(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(texts.size() * 8)));
    if (!ids || !lengths) throw PythonError{};
    char* const id_bytes = PyByteArray_AsString(ids.get());
    int64_t* const counts = reinterpret_cast<int64_t*>(PyByteArray_AsString(lengths.get()));
    size_t total = 0;
    bool out_of_memory = false;
    Py_BEGIN_ALLOW_THREADS
    try {
        const std::lock_guard<std::mutex> lock(*self->mutex);
        total = itemsize == 2
                    ? encode_all(*self->encoder, texts, bos, eos, reinterpret_cast<uint16_t*>(id_bytes), counts)
                    : encode_all(*self->encoder, texts, bos, eos, reinterpret_cast<int32_t*>(id_bytes), counts);
    } catch (const std::exception&) {  // a vector that could not grow
        out_of_memory = true;
    }
    Py_END_ALLOW_THREADS
    if (out_of_memory) throw std::bad_alloc();
    if (PyByteArray_Resize(ids.get(), static_cast<Py_ssize_t>(total * itemsize)) < 0) throw PythonError{};
    return PyTuple_Pack(2, ids.get(), lengths.get());
}

PyObject* encoder_encode(PyObject* self, PyObject* args) {
    PyObject* sequence;
    int bos, eos, itemsize;
    if (!PyArg_ParseTuple(args, "Oiii", &sequence, &bos, &eos, &itemsize)) return nullptr;
    auto* const object = reinterpret_cast<EncoderObject*>(self);
    return guarded([&] {
        const int64_t size = object->encoder->vocabulary().size();
        if (itemsize != 4 && !(itemsize == 2 && size <= 65536)) {
            throw std::invalid_argument("itemsize must be 4, or 2 for a vocabulary of at most 65,536");
        }
        if (bos >= size || eos >= size) throw std::invalid_argument("bos or eos is outside the vocabulary");
        return encode_texts(object, sequence, bos, eos, itemsize);
    });
}

PyMethodDef encoder_methods[] = {
    {"encode", encoder_encode, METH_VARARGS,
     "encode(texts, bos, eos, itemsize) -> (ids, lengths)\n\n"
     "Encodes a sequence of str, without the GIL. Returns bytearrays: ids of all texts in order (uint16 for itemsize 2,\n"
     "int32 for 4), and the number of ids of each text (int64). bos and eos frame each text that has ids; -1: none."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot encoder_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(encoder_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(encoder_dealloc)},
    {Py_tp_methods, encoder_methods},
    {0, nullptr},
};

PyType_Spec encoder_spec = {"megatron_mixtral.tokenizer.engines._native_bpe.Encoder", sizeof(EncoderObject), 0,
                            Py_TPFLAGS_DEFAULT, encoder_slots};

int module_exec(PyObject* module) {
    const Owned type(PyType_FromSpec(&encoder_spec));
    if (!type || PyModule_AddObjectRef(module, "Encoder", type.get()) < 0) return -1;
    return PyModule_AddStringConstant(module, "SOURCES", NATIVE_SOURCES);
}

PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(module_exec)},
    {0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_native_bpe", "BPE with byte fallback; see engines/native.py.", 0, nullptr, module_slots,
    nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native_bpe() { return PyModuleDef_Init(&module_definition); }
