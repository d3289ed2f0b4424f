// What modules hold, compared with what they held: the comparison of densenet_efficient/nn/
// snapshot.py, which comes before every call of a block and must see every change.
//
//   entries   a tuple of module, its class, layout and values for each
//   layout    of its __dict__: a tuple of the keys, in order, and behind them bytes, a rule each
//   values    those that the rules compare with, in order
//   rule      0  anything
//             1  equal to the value, and of its type
//             2  an empty dictionary
//             3  a dictionary whose values are those of the value, a tuple of keys and values
//             4  a dictionary of tensors: the value is a tuple of keys, each followed by whether
//                there is a tensor or None
//
// Keys are compared by identity: a dictionary keeps the one that it was first given. Layouts and
// values of modules that are alike are one object, which stays in the cache.
#pragma once

#include <Python.h>

namespace densenet_efficient {

class Snapshot {
 public:
  // kinds: the classes that a tensor may have.
  Snapshot(PyObject* entries, PyObject* kinds) : entries_(entries), kinds_(kinds) {}

  // A new list of the tensors of all modules; None where anything differs; null with an exception
  // that a comparison has raised.
  PyObject* tensors() {
    found_ = PyList_New(0);
    if (!found_) return nullptr;
    bool same = true;
    for (Py_ssize_t i = 0; same && i < PyTuple_GET_SIZE(entries_); i += 4) same = is_as_before(i);
    if (same) return found_;
    Py_DECREF(found_);
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }

 private:
  enum Rule { kAnything, kEqual, kEmpty, kValues, kTensors };
  PyObject *entries_, *kinds_, *found_ = nullptr;

  bool is_as_before(Py_ssize_t first) {
    PyObject* module = PyTuple_GET_ITEM(entries_, first);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GET_ITEM(entries_, first + 1))
      return false;
    PyObject* own = PyObject_GenericGetDict(module, nullptr);
    if (!own) return false;
    const bool same =
        matches(own, PyTuple_GET_ITEM(entries_, first + 2), PyTuple_GET_ITEM(entries_, first + 3));
    Py_DECREF(own);
    return same;
  }

  bool matches(PyObject* own, PyObject* layout, PyObject* values) {
    const Py_ssize_t size = PyTuple_GET_SIZE(layout) - 1;
    if (!PyDict_CheckExact(own) || PyDict_GET_SIZE(own) != size) return false;
    const char* rules = PyBytes_AS_STRING(PyTuple_GET_ITEM(layout, size));
    PyObject *key, *value;
    Py_ssize_t at = 0, next = 0;
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!PyDict_Next(own, &at, &key, &value) || key != PyTuple_GET_ITEM(layout, i)) return false;
      const char rule = rules[i];
      if (rule == kAnything) continue;
      if (rule == kEmpty) {
        if (!PyDict_Check(value) || PyDict_GET_SIZE(value) != 0) return false;
        continue;
      }
      PyObject* expected = PyTuple_GET_ITEM(values, next++);
      if (rule == kEqual ? !are_equal(value, expected)
                         : !holds_all(value, expected, rule == kTensors))
        return false;
    }
    return true;
  }

  static bool are_equal(PyObject* value, PyObject* expected) {
    if (value == expected) return true;
    if (Py_TYPE(value) != Py_TYPE(expected)) return false;
    Py_INCREF(value);  // the comparison may run anything
    const bool equal = PyObject_RichCompareBool(value, expected, Py_EQ) == 1;
    Py_DECREF(value);
    return equal;
  }

  bool holds_all(PyObject* inside, PyObject* expected, bool tensors) {
    const Py_ssize_t size = PyTuple_GET_SIZE(expected);
    if (!PyDict_CheckExact(inside) || 2 * PyDict_GET_SIZE(inside) != size) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (Py_ssize_t i = 0; i < size; i += 2) {
      if (!PyDict_Next(inside, &at, &key, &value) || key != PyTuple_GET_ITEM(expected, i))
        return false;
      PyObject* known = PyTuple_GET_ITEM(expected, i + 1);
      if (tensors ? !take(value, known == Py_True) : value != known) return false;
    }
    return true;
  }

  bool take(PyObject* value, bool is_tensor) {
    if ((value != Py_None) != is_tensor) return false;
    if (!is_tensor) return true;
    PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(value));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds_); ++i)
      if (kind == PyTuple_GET_ITEM(kinds_, i)) return PyList_Append(found_, value) == 0;
    return false;
  }
};

}  // namespace densenet_efficient
