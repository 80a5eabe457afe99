// SPDX-License-Identifier: Apache-2.0
// A writer of JSON text.
#ifndef SAGERT_HOST_JSON_H_
#define SAGERT_HOST_JSON_H_

#include <cstdint>
#include <string>

namespace sagert {

// Calls nest as the document does: begin_object, key, value, ..., end_object. Commas are its own affair.
class JsonWriter {
 public:
  void begin_object() { open('{'); }
  void end_object() { close('}'); }
  void begin_array() { open('['); }
  void end_array() { close(']'); }
  void key(const char* name);
  void value(const char* text);  // null gives null
  void value(const std::string& text);
  void value(int64_t number);
  void value(bool flag);
  template <typename T>
  void member(const char* name, const T& content) {
    key(name);
    value(content);
  }
  const std::string& text() const { return text_; }

 private:
  void open(char bracket);
  void close(char bracket);
  void separate();
  void quote(const std::string& text);

  std::string text_;
  bool need_comma_ = false;
};

}  // namespace sagert

#endif  // SAGERT_HOST_JSON_H_
