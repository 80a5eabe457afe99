// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <cstdio>

namespace sagert {

void JsonWriter::separate() {
  if (need_comma_) text_ += ", ";
  need_comma_ = true;
}

void JsonWriter::open(char bracket) {
  separate();
  text_ += bracket;
  need_comma_ = false;
}

void JsonWriter::close(char bracket) {
  text_ += bracket;
  need_comma_ = true;
}

void JsonWriter::quote(const std::string& text) {
  text_ += '"';
  for (char c : text) {
    auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      text_ += '\\';
      text_ += c;
    } else if (byte < 0x20 || byte >= 0x7f) {  // a device name in an unknown encoding must not break the document
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned>(byte));
      text_ += escape;
    } else {
      text_ += c;
    }
  }
  text_ += '"';
}

void JsonWriter::key(const char* name) {
  separate();
  quote(name);
  text_ += ": ";
  need_comma_ = false;
}

void JsonWriter::value(const char* text) {
  separate();
  if (text == nullptr) {
    text_ += "null";
  } else {
    quote(text);
  }
}

void JsonWriter::value(const std::string& text) { value(text.c_str()); }

void JsonWriter::value(int64_t number) {
  separate();
  text_ += std::to_string(number);
}

void JsonWriter::value(bool flag) {
  separate();
  text_ += flag ? "true" : "false";
}

}  // namespace sagert
