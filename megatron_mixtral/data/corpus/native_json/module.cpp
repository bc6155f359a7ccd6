// The Python module `_native_json`: one class, `LineReader`. Limited API, so that one build serves Python 3.12 and later.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "scanner.h"

namespace {

constexpr size_t kLongestLine = size_t{1} << 24;  // a longer one is left to the caller: its text is not copied twice then

struct ReaderObject {
    PyObject_HEAD
    json::Scanner* scanner;
    size_t keys;
};

// A reference that is given up at the end of its scope.
struct Decref {
    void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Decref>;

// A str, or null without an error set where the bytes are not UTF-8.
Owned decoded(std::string_view bytes) {
    Owned text(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), nullptr));
    if (!text && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) PyErr_Clear();
    return text;
}

// Appends the texts of the line last scanned. False: an error is set, or some bytes are not UTF-8 and nothing is appended.
bool append_texts(const ReaderObject& reader, const std::vector<PyObject*>& columns) {
    for (std::string_view piece : reader.scanner->unchecked()) {
        if (!decoded(piece)) return false;
    }
    std::vector<Owned> texts;
    for (size_t k = 0; k < reader.keys; ++k) {
        texts.push_back(decoded(reader.scanner->text(k)));
        if (!texts.back()) return false;
    }
    for (size_t k = 0; k < reader.keys; ++k) {
        if (PyList_Append(columns[k], texts[k].get()) < 0) return false;
    }
    return true;
}

PyObject* read(const ReaderObject& reader, std::string_view block, size_t start, size_t most) {
    const Owned result(PyTuple_New(static_cast<Py_ssize_t>(reader.keys)));
    if (!result) return nullptr;
    std::vector<PyObject*> columns;
    for (size_t k = 0; k < reader.keys; ++k) {
        PyObject* const column = PyList_New(0);
        if (!column || PyTuple_SetItem(result.get(), static_cast<Py_ssize_t>(k), column) < 0) return nullptr;
        columns.push_back(column);
    }
    size_t at = start, lines = 0;
    while (at < block.size() && at - start < most) {
        const char* const found = static_cast<const char*>(std::memchr(block.data() + at, '\n', block.size() - at));
        const size_t end = found ? static_cast<size_t>(found - block.data()) : block.size();
        if (end - at > kLongestLine || !reader.scanner->scan(block.substr(at, end - at))) break;
        if (!append_texts(reader, columns)) {
            if (PyErr_Occurred()) return nullptr;
            break;
        }
        ++lines;
        at = end + (found ? 1 : 0);
    }
    return Py_BuildValue("Onn", result.get(), static_cast<Py_ssize_t>(lines), static_cast<Py_ssize_t>(at));
}

PyObject* reader_read(PyObject* self, PyObject* args) {
    const char* bytes;
    Py_ssize_t length, start, end, most;
    if (!PyArg_ParseTuple(args, "y#nnn", &bytes, &length, &start, &end, &most)) return nullptr;
    if (start < 0 || start > end || end > length || most < 1) {
        PyErr_SetString(PyExc_ValueError, "0 <= start <= end <= len(data) and most >= 1 must hold");
        return nullptr;
    }
    try {
        return read(*reinterpret_cast<ReaderObject*>(self), {bytes, static_cast<size_t>(end)},
                    static_cast<size_t>(start), static_cast<size_t>(most));
    } catch (const std::exception&) {  // a vector that could not grow
        return PyErr_NoMemory();
    }
}

PyObject* reader_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject* given;
    if (!PyArg_ParseTuple(args, "O", &given)) return nullptr;
    const Owned tuple(PySequence_Tuple(given));
    if (!tuple) return nullptr;
    try {
        std::vector<std::string> keys;
        for (Py_ssize_t k = 0; k < PyTuple_Size(tuple.get()); ++k) {
            Py_ssize_t length;
            const char* const key = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(tuple.get(), k), &length);
            if (!key) return nullptr;
            keys.emplace_back(key, static_cast<size_t>(length));
        }
        const size_t count = keys.size();
        auto scanner = std::make_unique<json::Scanner>(std::move(keys));
        const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
        PyObject* const self = allocate(type, 0);
        if (!self) return nullptr;
        reinterpret_cast<ReaderObject*>(self)->scanner = scanner.release();
        reinterpret_cast<ReaderObject*>(self)->keys = count;
        return self;
    } catch (const std::exception&) {
        return PyErr_NoMemory();
    }
}

void reader_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    delete reinterpret_cast<ReaderObject*>(self)->scanner;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyMethodDef reader_methods[] = {
    {"read", reader_read, METH_VARARGS,
     "read(data, start, end, most) -> (columns, lines, stop)\n\n"
     "Reads lines of bytes from `start`, where a line begins, to `end`, each one JSON object. `columns` holds a list of\n"
     "str for each key; `stop` is where the next line begins: `end`, or behind `most` bytes or more, or at a line that\n"
     "is declined. When `lines` is 0 and `start` < `end`, the first line is such a one."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot reader_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(reader_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(reader_dealloc)},
    {Py_tp_methods, reader_methods},
    {0, nullptr},
};

PyType_Spec reader_spec = {"megatron_mixtral.data.corpus._native_json.LineReader", sizeof(ReaderObject), 0,
                           Py_TPFLAGS_DEFAULT, reader_slots};

int module_exec(PyObject* module) {
    const Owned type(PyType_FromSpec(&reader_spec));
    if (!type || PyModule_AddObjectRef(module, "LineReader", type.get()) < 0) return -1;
    return PyModule_AddStringConstant(module, "SOURCES", NATIVE_SOURCES);
}

PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(module_exec)},
    {0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_native_json", "Lines of JSON to texts; see records.py.", 0, nullptr, module_slots,
    nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native_json() { return PyModuleDef_Init(&module_definition); }
