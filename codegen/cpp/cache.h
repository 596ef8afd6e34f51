// Updates of caches by generated programs (included by vec.h).
#pragma once

namespace tile {

// Strides of what is written, in bytes.
struct Places {
  int64_t batch, head, token;
};

// cache[b, h, position[b] + t] = fresh[b, h, t], of `bytes` bytes each; what lies beyond `length` is left out.
INLINE void update_rows(char* cache, const char* fresh, const int64_t* position, int64_t batch, int64_t heads, int64_t tokens, int64_t length,
                        int64_t bytes, Places at) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t row = position[b] + t;
        if (row >= 0 && row < length)
          __builtin_memcpy(cache + ((b * heads + h) * length + row) * bytes, fresh + b * at.batch + h * at.head + t * at.token, bytes);
      }
}

}  // namespace tile
