// How the host program calls kernels (included by vec.h): one entry for kernels of any signature.
//
// A run of calls is a list of words: for each call the address of its entry, the number of its arguments, and for each argument its
// place in `values`, a table of addresses, sizes and the number of threads. 0 ends it.
#pragma once

namespace tile {

typedef int64_t Entry(const int64_t* values, const int64_t* places);

template <int... I> struct Numbers {};
template <int N, int... I> struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I> struct UpTo<0, I...> { typedef Numbers<I...> type; };

template <class... A, int... I> INLINE int64_t enter(void (*kernel)(A...), const int64_t* values, const int64_t* places, Numbers<I...>) {
  kernel((A)values[places[I]]...);
  return 0;
}
template <class... A, int... I> INLINE int64_t enter(int64_t (*kernel)(A...), const int64_t* values, const int64_t* places, Numbers<I...>) {
  return kernel((A)values[places[I]]...);
}

// Calls the kernel; the fault it met, or 0.
template <class R, class... A> INLINE int64_t enter(R (*kernel)(A...), const int64_t* values, const int64_t* places) {
  return enter(kernel, values, places, typename UpTo<sizeof...(A)>::type{});
}

// Makes the calls up to the first that meets a fault: its number times 2^32 plus the fault, or 0.
INLINE int64_t run(const int64_t* words, const int64_t* values) {
  for (int64_t call = 0; *words; call++, words += 2 + words[1])
    if (int64_t fault = ((Entry*)words[0])(values, words + 2)) return (call << 32) + fault;
  return 0;
}

}  // namespace tile
