//! The part of pickle that state dicts are made of: containers, numbers, texts, and tensors that lie elsewhere in
//! the file.
//!
//! A pickle is a program for a small stack machine, and what makes it dangerous is that it may name any Python
//! function and call it. This machine has no functions. It knows the few names in [`Callable`] as notes of what a
//! tensor is, and refuses every other name. Nothing that it makes is larger than the input by more than a constant
//! factor, and nothing refers to anything but by index, so that nested or shared values cost no stack and no copies.

mod heap;
mod input;

use std::collections::HashMap;
use std::io::BufRead;

use heap::{Callable, MAX_AXES, callable, refusal};
pub(super) use heap::{Heap, STORAGES, Storage, Value};
pub(super) use input::{Input, MAX_BYTES};

/// What is wrong, without the file's name.
pub(super) type Result<T> = std::result::Result<T, String>;

/// Most values that are kept: a state dict has about 30 a tensor.
const MAX_VALUES: usize = 1 << 20;
/// Longest integer, in bytes.
const MAX_INTEGER: usize = 16;

/// Runs one pickle; the value that it leaves.
pub(super) fn load(input: &mut Input<impl BufRead>) -> Result<(Heap, Value)> {
    let mut machine = Machine {
        input,
        heap: Heap::default(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        made: 0,
    };
    while machine.step()? {}
    let value = machine.pop()?;
    Ok((machine.heap, value))
}

struct Machine<'i, R> {
    input: &'i mut Input<R>,
    heap: Heap,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    made: usize,
}

impl<R: BufRead> Machine<'_, R> {
    /// One instruction; false at the end.
    fn step(&mut self) -> Result<bool> {
        let code = self.input.byte()?;
        match code {
            0x80 => match self.input.byte()? {
                0..=5 => {}
                version => return Err(format!("pickle protocol {version}; protocols up to 5 are known")),
            },
            0x95 => drop(self.input.array::<8>()?), // the length of a frame, which is a hint for buffering
            b'.' => return Ok(false),
            b'(' => {
                self.count(1)?;
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.top()?;
                self.push(top)?;
            }
            b'N' | 0x88 | 0x89 | b'J' | b'K' | b'M' | 0x8a | 0x8b | b'G' => self.scalar(code)?,
            b'X' | 0x8c | 0x8d | b'U' | b'T' | b'C' | b'B' | 0x8e => self.text(code)?,
            b')' | b't' | 0x85..=0x87 | b']' | b'l' | b'}' | b'd' | b'a' | b'e' | b's' | b'u' => {
                self.container(code)?;
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(code)?,
            b'c' | 0x93 | b'R' | 0x81 | b'b' | b'Q' | b'i' => self.object(code)?,
            other => {
                return Err(format!("pickle instruction 0x{other:02x}, which no state dict needs: refused"));
            }
        }
        Ok(true)
    }

    fn scalar(&mut self, code: u8) -> Result<()> {
        let value = match code {
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'J' => Value::Int(i32::from_le_bytes(self.input.array()?).into()),
            b'K' => Value::Int(self.input.byte()?.into()),
            b'M' => Value::Int(u16::from_le_bytes(self.input.array()?).into()),
            0x8a => {
                let length = self.input.byte()?;
                self.long(length.into())?
            }
            0x8b => {
                let length = u32::from_le_bytes(self.input.array()?);
                self.long(length as usize)?
            }
            _ => {
                self.input.array::<8>()?;
                Value::Float
            }
        };
        self.push(value)
    }

    /// A little-endian integer in two's complement.
    fn long(&mut self, length: usize) -> Result<Value> {
        if length > MAX_INTEGER {
            return Err(format!("an integer of {length} bytes, at most {MAX_INTEGER} are read"));
        }
        let bytes = self.input.bytes(length as u64)?;
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut whole = [if negative { 0xff } else { 0 }; MAX_INTEGER];
        whole[..bytes.len()].copy_from_slice(&bytes);
        Ok(Value::Int(i128::from_le_bytes(whole)))
    }

    fn text(&mut self, code: u8) -> Result<()> {
        let length = match code {
            0x8c | b'U' | b'C' => self.input.byte()?.into(),
            0x8d | 0x8e => u64::from_le_bytes(self.input.array()?),
            _ => u32::from_le_bytes(self.input.array()?).into(),
        };
        if matches!(code, b'C' | b'B' | 0x8e) {
            self.input.bytes(length)?;
            return self.push(Value::Bytes);
        }
        let text = self.input.text(length)?;
        self.heap.texts.push(text);
        self.push(Value::Text(self.heap.texts.len() - 1))
    }

    fn container(&mut self, code: u8) -> Result<()> {
        match code {
            b')' => self.push_sequence(Vec::new(), Value::Tuple),
            b't' => {
                let items = self.pop_mark()?;
                self.push_sequence(items, Value::Tuple)
            }
            0x85..=0x87 => {
                let length = usize::from(code - 0x84);
                let mut items = (0..length).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                items.reverse();
                self.push_sequence(items, Value::Tuple)
            }
            b']' => self.push_sequence(Vec::new(), Value::List),
            b'l' => {
                let items = self.pop_mark()?;
                self.push_sequence(items, Value::List)
            }
            b'}' => self.push_dict(Vec::new()),
            b'd' => {
                let items = self.pop_mark()?;
                self.push_dict(pairs(&items)?)
            }
            b'a' | b'e' => {
                let items = if code == b'a' { vec![self.pop()?] } else { self.pop_mark()? };
                match self.top()? {
                    Value::List(id) => self.heap.sequences[id].extend(items),
                    other => return Err(format!("the pickle appends to {}", other.what())),
                }
                Ok(())
            }
            _ => {
                let items = if code == b's' { self.pop_two()?.to_vec() } else { self.pop_mark()? };
                match self.top()? {
                    Value::Dict(id) => self.heap.dicts[id].extend(pairs(&items)?),
                    other => return Err(format!("the pickle sets an item of {}", other.what())),
                }
                Ok(())
            }
        }
    }

    fn memory(&mut self, code: u8) -> Result<()> {
        let index = match code {
            b'q' | b'h' => self.input.byte()?.into(),
            b'r' | b'j' => u32::from_le_bytes(self.input.array()?).into(),
            _ => self.memo.len() as u64,
        };
        if matches!(code, b'h' | b'j') {
            let value = self.memo.get(&index).copied();
            return self.push(value.ok_or_else(|| format!("the pickle has nothing under {index}"))?);
        }
        let value = self.top()?;
        self.count(1)?;
        self.memo.insert(index, value);
        Ok(())
    }

    fn object(&mut self, code: u8) -> Result<()> {
        match code {
            b'c' => {
                let (module, name) = (self.input.line()?, self.input.line()?);
                self.push(Value::Callable(callable(&module, &name)?))
            }
            b'i' => {
                let (module, name) = (self.input.line()?, self.input.line()?);
                Err(refusal(&module, &name))
            }
            0x93 => {
                let [module, name] = self.pop_two()?;
                let (Some(module), Some(name)) = (self.heap.text(module), self.heap.text(name)) else {
                    return Err("the pickle has a name that is not a text".into());
                };
                let callable = callable(module, name)?;
                self.push(Value::Callable(callable))
            }
            b'R' | 0x81 => {
                let [callable, arguments] = self.pop_two()?;
                let arguments = self.heap.tuple(arguments, "arguments")?.to_vec();
                let value = self.call(callable, &arguments)?;
                self.push(value)
            }
            b'b' => {
                // Attributes of an OrderedDict: the versions of the modules, which loading does not need.
                let state = self.pop()?;
                match (self.top()?, state) {
                    (Value::Dict(_), Value::Dict(_)) => Ok(()),
                    (object, state) => {
                        Err(format!("the pickle sets the state of {} to {}", object.what(), state.what()))
                    }
                }
            }
            _ => {
                let id = self.pop()?;
                let storage = self.heap.storage(id)?;
                self.push(Value::Storage(storage))
            }
        }
    }

    fn call(&mut self, callable: Value, arguments: &[Value]) -> Result<Value> {
        let Value::Callable(callable) = callable else {
            return Err(format!("the pickle calls {}", callable.what()));
        };
        self.count(arguments.len())?;
        match (callable, arguments) {
            (Callable::OrderedDict, []) => self.new_dict(Vec::new()),
            (Callable::OrderedDict, [Value::List(list)]) => {
                // As Python 2 wrote it: a list of pairs.
                self.count(3 * self.heap.sequences[*list].len())?;
                let list = self.heap.sequences[*list].clone();
                let pair = |item: Value| match item {
                    Value::Tuple(id) | Value::List(id) => match self.heap.sequences[id][..] {
                        [key, value] => Ok((key, value)),
                        _ => Err("the pickle makes a dict of what are not pairs".to_owned()),
                    },
                    other => Err(format!("the pickle makes a dict of {}", other.what())),
                };
                let items = list.into_iter().map(pair).collect::<Result<_>>()?;
                self.new_dict(items)
            }
            (Callable::Size, [size @ (Value::Tuple(_) | Value::List(_))]) => Ok(*size),
            (Callable::Tensor { arguments: [least, most] }, _)
                if (least..=most).contains(&arguments.len()) =>
            {
                self.count(2 * MAX_AXES)?;
                self.heap.tensor(arguments)
            }
            (Callable::Parameter, [tensor @ Value::Tensor(_), _, _]) => Ok(*tensor),
            (callable, _) => {
                let what = match callable {
                    Callable::OrderedDict => "an OrderedDict",
                    Callable::Size => "a Size",
                    Callable::Tensor { .. } => "a tensor",
                    Callable::Parameter => "a parameter",
                    Callable::Storage(_) => "a storage",
                };
                let got: Vec<_> = arguments.iter().take(8).map(|value| value.what()).collect();
                Err(format!("the pickle makes {what} of ({})", got.join(", ")))
            }
        }
    }

    /// Counts values that are kept.
    fn count(&mut self, values: usize) -> Result<()> {
        self.made = self.made.saturating_add(values);
        if self.made > MAX_VALUES {
            return Err(format!("the pickle makes more than {MAX_VALUES} values; no state dict does"));
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<()> {
        self.count(1)?;
        self.stack.push(value);
        Ok(())
    }

    fn push_sequence(&mut self, items: Vec<Value>, wrap: fn(usize) -> Value) -> Result<()> {
        self.heap.sequences.push(items);
        self.push(wrap(self.heap.sequences.len() - 1))
    }

    fn push_dict(&mut self, items: Vec<(Value, Value)>) -> Result<()> {
        let dict = self.new_dict(items)?;
        self.push(dict)
    }

    fn new_dict(&mut self, items: Vec<(Value, Value)>) -> Result<Value> {
        self.heap.dicts.push(items);
        Ok(Value::Dict(self.heap.dicts.len() - 1))
    }

    /// The values above the last mark are all that may be taken.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Value> {
        match self.stack.last() {
            Some(value) if self.stack.len() > self.floor() => Ok(*value),
            _ => Err("the pickle takes a value where there is none".into()),
        }
    }

    fn pop(&mut self) -> Result<Value> {
        let value = self.top()?;
        self.stack.pop();
        Ok(value)
    }

    fn pop_two(&mut self) -> Result<[Value; 2]> {
        let second = self.pop()?;
        Ok([self.pop()?, second])
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().ok_or("the pickle goes back to a mark that is not there")?;
        Ok(self.stack.split_off(mark))
    }
}

fn pairs(items: &[Value]) -> Result<Vec<(Value, Value)>> {
    let pairs = items.chunks_exact(2);
    match pairs.remainder() {
        [] => Ok(pairs.map(|pair| (pair[0], pair[1])).collect()),
        _ => Err("the pickle has a key without a value".into()),
    }
}
